"""Layers that take the place of torch's own where those cannot express a narrowed network."""

from .attention import NarrowAttention, unsupported
from .norm import KeptStatisticsNorm
from .spread import spread, spreadable

__all__ = ["KeptStatisticsNorm", "NarrowAttention", "spread", "spreadable", "unsupported"]
