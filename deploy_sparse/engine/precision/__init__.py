"""From a float32 ONNX graph to one in the precision of a target, between export and compilation.

Compilers that are strongly typed take number formats from the graph, so a precision is a graph of its own: read and
prepared by :mod:`.graph`, converted by :mod:`.floats` (fp16, bf16) or :mod:`.quantize` (int8, fp8), read back by
:mod:`.reading`, compared with float32 by :mod:`.agreement`. :mod:`.stage` calls them in order.
"""
