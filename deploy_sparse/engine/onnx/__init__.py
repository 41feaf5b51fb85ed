"""ONNX files: written from a module, read and checked, looked into, and run by ONNX Runtime."""
