"""The `cmscale` command, one file per group of commands."""
