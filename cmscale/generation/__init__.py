"""Makes images with a trained network: drawn samples and edited pictures."""
