"""Reference statistics and the formats that hold them, one per module; `reference` and `registry` have what they share.

To add a format, write `NAME.py` here and export a `registry.ReferenceFormat` as `FORMAT`: which files it holds, how one
is read, and, if it can be written, how. Nothing else changes: `--reference` recognises its files, and a format with a
writer is a `--format` of data_prep/reference.py. A module imports torch when it reads a file, as commands list the
formats first. An example is in tests/evaluation/test_reference.py.
"""
