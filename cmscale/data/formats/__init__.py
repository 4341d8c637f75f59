"""The shard formats that a data set can have."""
