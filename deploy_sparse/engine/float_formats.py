"""Number formats by the names that targets use, and whether what was built is what was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import BuildError
from .target import Target

if TYPE_CHECKING:
    import onnx

_NAMES = {
    **{"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"},
    **{"float8": "fp8", "float8_e4m3fn": "fp8", "float8_e5m2": "fp8"},
}


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


def check_graph(model: onnx.ModelProto, types: frozenset[str], target: Target) -> None:
    """Refuse an ONNX graph that is not in float32 for a target that is. Lowered ones are checked as they are made.

    Raises:
        BuildError: it has other floating-point types, or Q/DQ pairs.
    """
    if target.precision != "fp32":
        return
    from .precision.reading import layer_formats

    low = {*layer_formats(model).values()} - {"fp32", "fp64"}
    if low:
        built = " + ".join(sorted(low))
        raise BuildError(
            f"asked for fp32, but the ONNX graph is {precision_of(types) if types - {'float32'} else built}",
            expected="fp32 throughout",
            fix=f"build it as it is, with precision {min(low)}; or start from the float32 graph or module.float()",
        )
    check_precision(types, target, "the ONNX graph")


def check_network(parsed: frozenset[str], given: frozenset[str], target: Target) -> None:
    """Refuse a compiler's network that is not in the target's precision.

    Args:
        parsed: types of the network's tensors; integers may be among them.
        given: floating-point types of the ONNX graph that it was parsed from, which was checked before.

    Raises:
        BuildError: in fp32 another type; otherwise one that the graph does not have, or none of the precision.
    """
    floats = frozenset(name for name in parsed if "float" in name)
    if target.precision == "fp32":
        return check_precision(floats, target, "the parsed network")
    here, there = ({_NAMES.get(name, name) for name in names} for names in (floats, given))
    if here <= there and (target.precision == "int8" or target.precision in here):
        return None
    raise BuildError(
        f"asked for {target.precision}, but the parsed network is {precision_of(floats)}",
        expected=f"the types of the graph, {precision_of(given)}",
        fix="exclude the layers that the parser converts, or build in another precision",
    )


def advised(problem: BuildError, target: Target) -> BuildError:
    """The same problem with what to do about it, where it comes from the precision."""
    fix = problem.fix
    if "FP32 GEMM is not supported" in problem.given:
        fix = "this GPU has no fp32 matrix products: build with precision fp16" + (
            ", and exclude none of them" if target.precision in ("fp16", "bf16") else ""
        )
    elif target.precision == "fp8" and target.on_gpu and not target.compute_capabilities:  # else those are new enough
        fix = "fp8 needs GPUs of SM89 or later: take rtx-sm89 or rtx-sm120, or build in int8 or fp16"
    elif target.on_gpu and target.precision == "int8" and "uantizeLinear" in problem.given:
        fix = f"a graph that was quantized for ONNX Runtime: build from the float32 file, with calibration; else {fix}"
    elif "ran out of memory" not in problem.given and target.precision != "fp32":
        fix = f"exclude the layer it names, or build in {'fp16' if target.precision == 'bf16' else 'fp32'}; or {fix}"
    return BuildError(problem.given, expected=problem.expected, fix=fix)
