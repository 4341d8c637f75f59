"""Layer 3: networks spread over ranks by DeepSpeed, and everything that keeps a run from losing its work."""
