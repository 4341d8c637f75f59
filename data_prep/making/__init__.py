"""Makes the shards of a data set: image conversion, shard files, progress records, worker processes, Slurm arrays."""
