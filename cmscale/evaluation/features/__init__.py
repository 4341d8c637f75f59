"""Feature networks for the metrics, one per module; `extractor` has what they share.

To add one, write `NAME.py` here: a subclass of `extractor.FeatureNetwork` with its label, the name of its Fréchet
distance, its width, its preprocessing and forward pass, and where its weights come from, exported as `NETWORK`. Nothing
else changes: `evaluate.features=NAME` and the commands' `--features NAME` find the module by its name, and
`evaluate.features_weights` names a weights file. An example is in tests/evaluation/test_features.py.
"""
