"""TensorRT and TensorRT-RTX: one module imports them, the others build, time and run with what it gives."""
