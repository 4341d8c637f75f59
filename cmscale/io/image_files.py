"""Defines which files count as images and how large an image may be, for everything that decodes images."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# 8192 x 8192: far more than any photograph of a data set, far less than what fills the memory. Pillow itself raises
# only at twice its own limit, so every reader checks the header's size before it decodes.
MAX_IMAGE_PIXELS = 1 << 26
