"""From a module to something that runs: export to ONNX, compile for a target, load and run.

Takes an ``nn.Module`` or an ONNX file; knows nothing of tickets or surgery.
"""
