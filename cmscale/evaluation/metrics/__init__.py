"""The metrics. Each module except `registry` holds one or several in `METRICS`; ops/adding_a_metric.md adds one."""
