"""The metrics. Each module except `registry` holds one or several and lists them in `METRICS`."""
