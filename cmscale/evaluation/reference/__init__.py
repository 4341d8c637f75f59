"""Reference statistics and the file formats that hold them."""
