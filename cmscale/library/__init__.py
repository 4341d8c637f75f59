"""Offers trained models to Python programs: `cmscale.load(...)` gives a model that samples and edits images.

Images come in as files, PIL images or tensors, and go out as PIL images, or as tensors on request.
"""

from cmscale.library.model import Model, load

__all__ = ["Model", "load"]
