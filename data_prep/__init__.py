"""Data sets: LSUN LMDBs and image folders to checked shards, and reference statistics of them."""
