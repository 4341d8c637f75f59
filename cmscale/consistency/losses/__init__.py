"""The training losses, one file per method."""
