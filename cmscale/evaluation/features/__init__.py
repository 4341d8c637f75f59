"""Feature networks for the metrics, one per module; `extractor` has what they share."""
