"""The metrics and the statistics that they need."""
