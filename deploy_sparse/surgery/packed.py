"""Layers that compute only the surviving blocks of their weights, and own the format they keep them in."""

from .packed_conv import PackedConv2d
from .packed_linear import PackedLinear
from .packing import Form, Packing, packing_of

__all__ = ["Form", "PackedConv2d", "PackedLinear", "Packing", "packing_of"]
