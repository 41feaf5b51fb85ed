"""Layers that take the place of torch's own where those cannot express a narrowed network."""

from .attention import NarrowAttention, unsupported
from .norm import KeptStatisticsNorm

__all__ = ["KeptStatisticsNorm", "NarrowAttention", "unsupported"]
