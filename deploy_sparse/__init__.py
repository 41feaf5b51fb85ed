"""Structural lottery tickets, exact network surgery, TensorRT engines and defended measurements.

The public names below are resolved on first use, so importing the package imports no heavy library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import compact as compact
    from .api import load_compact as load_compact
    from .api import load_program as load_program
    from .api import oneshot_ticket as oneshot_ticket
    from .bundle.make import bundle_engine as bundle_engine
    from .bundle.opened import open_bundle as open_bundle
    from .dynamic import dynamic_sparsity as dynamic_sparsity
    from .engine.build import build_engine as build_engine
    from .engine.onnx.export import export_onnx as export_onnx
    from .engine.runner import load_engine as load_engine
    from .measure.profile import profile as profile
    from .ticket import Ticket as Ticket

__version__ = "0.1.0.dev0"

_HOMES = {
    "Ticket": ".ticket",
    "compact": ".api",
    "load_compact": ".api",
    "load_program": ".api",
    "oneshot_ticket": ".api",
    "dynamic_sparsity": ".dynamic",
    "export_onnx": ".engine.onnx.export",
    "build_engine": ".engine.build",
    "bundle_engine": ".bundle.make",
    "open_bundle": ".bundle.opened",
    "load_engine": ".engine.runner",
    "profile": ".measure.profile",
}
__all__ = [
    "Ticket",
    "build_engine",
    "bundle_engine",
    "compact",
    "dynamic_sparsity",
    "export_onnx",
    "load_compact",
    "load_engine",
    "load_program",
    "oneshot_ticket",
    "open_bundle",
    "profile",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name], __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
