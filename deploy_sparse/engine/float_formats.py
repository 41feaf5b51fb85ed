"""Number formats by the names that targets use, and whether what was built is what was asked for."""

from __future__ import annotations

from ..errors import BuildError
from .target import Target

_NAMES = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def precision_of(types: frozenset[str]) -> str:
    """What tensors of these types compute in; types by NumPy's names, for example ``{"float32"}``."""
    return " + ".join(sorted(_NAMES.get(name, name) for name in types)) or "no floating point"


def check_precision(types: frozenset[str], target: Target, where: str) -> None:
    """Refuse a graph whose floating-point types are others than the target's precision.

    Raises:
        BuildError: they are; ``where`` says in the message what has them.
    """
    built = precision_of(types)
    if not types or built == target.precision:
        return
    fix = "convert the module before the build: module.float()"
    if target.precision != "fp32":
        fix = "let forward take types from its inputs: x.to(y.dtype), never .float(); or build it in fp32"
    raise BuildError(
        f"asked for {target.precision}, but {where} is {built}", expected=f"{target.precision} throughout", fix=fix
    )
