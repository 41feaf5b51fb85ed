"""PyTorch as a runtime: an exported program prepared, timed in its forms and run."""
