"""From a module to something that runs: export to ONNX, compile for a target, load and run.

Takes an ``nn.Module`` or an ONNX file; knows nothing of tickets or surgery.
"""

import os

# ONNX Runtime from 1.29 on reports to its makers from a thread of its own, which a timed process must not have either.
# Whoever wants that sets the variable to 0; it counts until onnxruntime is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
