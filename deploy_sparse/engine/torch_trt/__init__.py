"""Torch-TensorRT: a module compiled through its dynamo front end, and its engines run."""
