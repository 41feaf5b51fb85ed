"""Does the compact network compute what the masked one does? Measured, in float32 and float64, or refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import SurgeryError
from ._sizes import Shapes, free_size, random_inputs, slightly_larger
from .graph import Inputs, as_tuple

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Largest accepted ``max|Δ| / max|y|`` by the precision of the outputs."""

Sample = tuple[str, tuple[Any, ...]]
_SEED = 20220713
_BATCHES = (1, 3)
_UNITS = 16  # how many units of the last place rounding may cost in float16 and bfloat16


@dataclass(frozen=True)
class Deviation:
    """Largest differences between two networks over all inputs and outputs.

    Attributes:
        max_abs: ``max|Δ|``.
        max_rel: ``max|Δ| / max|y|``, the largest of any output tensor.
        top1_agreement: share of samples whose largest output along axis 1 is the same, 1.0 for outputs of one axis.
    """

    max_abs: float
    max_rel: float
    top1_agreement: float


@dataclass(frozen=True)
class Rounding:
    """Numbers that surgery reckoned and the compact network holds in a lower precision than they were reckoned in.

    Attributes:
        numbers: how many changed.
        precision: what they were rounded to, for example ``"float32"``.
        float64: deviation of the delivered network, biases rounded, with weights and inputs cast to float64.
    """

    numbers: int
    precision: str
    float64: Deviation


@dataclass(frozen=True)
class Parity:
    """How closely a compact network follows its masked dense network.

    Attributes:
        float32: deviation with weights and inputs in float32; of networks in half precision, before reckoned numbers
            were rounded to it.
        float64: deviation with weights and inputs in float64, before reckoned numbers were rounded.
        inputs: what it was measured on, and which input sizes could not be tried.
        rounding: what rounding the reckoned numbers changed, None where nothing was rounded.
    """

    float32: Deviation
    float64: Deviation
    inputs: tuple[str, ...]
    rounding: Rounding | None = None

    def __str__(self) -> str:
        """One line for people."""
        single, double, after = self.float32, self.float64, self.rounding
        rounded = (
            f" (before {after.numbers} reckoned numbers were rounded to {after.precision}; "
            f"{after.float64.max_rel:.1e} after)"
            if after is not None
            else ""
        )
        return (
            f"max|Δ| / max|y| {single.max_rel:.1e} in float32 and {double.max_rel:.1e} in float64{rounded}, "
            f"top-1 agreement {single.top1_agreement:.1%}, on {'; '.join(self.inputs)}"
        )


def verify(
    dense: torch.nn.Module,
    compact: torch.nn.Module,
    example_inputs: Inputs,
    *,
    exact: torch.nn.Module | None = None,
) -> Parity:
    """Compare two networks in evaluation mode on the given inputs and on seeded random ones of several sizes.

    Random inputs have other batch sizes, and other spatial sizes (axis 2 and on), where the dense network takes them.

    Args:
        dense: the dense network with masked weights; it is the reference. Neither module is changed.
        compact: the smaller network.
        example_inputs: one tensor with a batch axis, or the tuple of positional inputs.
        exact: ``compact`` before what surgery reckoned was rounded to float32, in float64. A rounded number is off by
            1e-8, so the float64 comparison is made with ``exact``, ``compact`` must equal it after rounding, bit by
            bit, and what the rounding changed is measured too.

    Raises:
        SurgeryError: an output of another shape, not finite, or further off than ``TOLERANCE`` allows; or a network
            that does not run, or does not compute the same twice.
    """
    reference = copy.deepcopy(dense).eval().to(torch.float64)
    examples = as_tuple(example_inputs)
    _refuse_random(reference, examples)
    samples, untried = _samples(examples, reference)
    changed = 0 if exact is None else _rounded(compact, exact)
    delivered = copy.deepcopy(compact).eval().to(torch.float64)
    unrounded = copy.deepcopy(exact).eval().to(torch.float64) if exact is not None and changed else delivered
    double = _deviation(reference, unrounded, samples, torch.float64, TOLERANCE)
    rounding = None
    rounded = compact
    if changed:
        assert exact is not None
        limit = max(TOLERANCE[torch.float32], _UNITS * _resolution(compact))
        after = _deviation(reference, delivered, samples, torch.float64, dict.fromkeys(TOLERANCE, limit))
        rounding = Rounding(changed, _precision(compact), after)
        rounded = exact if limit > TOLERANCE[torch.float32] else compact
    del reference, delivered, unrounded
    pair = [copy.deepcopy(module).eval().to(torch.float32) for module in (dense, rounded)]
    single = _deviation(pair[0], pair[1], samples, torch.float32, TOLERANCE)
    return Parity(single, double, (*(name for name, _ in samples), *untried), rounding)


def _deviation(
    dense: torch.nn.Module,
    compact: torch.nn.Module,
    samples: Sequence[Sample],
    dtype: torch.dtype,
    tolerance: Mapping[torch.dtype, float],
) -> Deviation:
    max_abs = max_rel = 0.0
    agreed = total = 0
    for name, inputs in samples:
        cast = tuple(pytree.tree_map(lambda x: _cast(x, dtype), inputs))
        expected = _run(dense, cast, "the masked dense network")
        actual = _run(compact, cast, "the compact network")
        if [y.shape for y in actual] != [y.shape for y in expected]:
            raise _refusal(
                f"the compact network's outputs have shapes {_shapes(actual)} on {name}, the masked network's "
                f"{_shapes(expected)}"
            )
        for reference, output in zip(expected, actual, strict=True):
            for what, tensor in (("masked dense", reference), ("compact", output)):
                if not bool(torch.isfinite(tensor).all()):
                    raise _refusal(f"the {what} network's output on {name} has entries that are NaN or infinite")
            absolute, relative = _distance(reference, output)
            limit = tolerance.get(reference.dtype, tolerance[torch.float32])
            if relative > limit:
                raise _refusal(
                    f"the compact network differs from the masked one by {absolute:.3g}, {relative:.3g} of max|y|, in "
                    f"{str(reference.dtype).removeprefix('torch.')} on {name}"
                )
            max_abs, max_rel = max(max_abs, absolute), max(max_rel, relative)
            same, count = _top1(reference, output)
            agreed, total = agreed + same, total + count
    return Deviation(max_abs, max_rel, agreed / total if total else 1.0)


def _rounded(compact: torch.nn.Module, exact: torch.nn.Module) -> int:
    """How many numbers of ``compact`` differ from ``exact``; each must be the rounded one."""
    unrounded, changed = exact.state_dict(), 0
    for name, tensor in compact.state_dict().items():
        if name not in unrounded or not torch.equal(tensor, unrounded[name].to(tensor.dtype)):
            raise _refusal(f"{name!r} of the compact network is not its float64 counterpart, rounded")
        changed += int((tensor != unrounded[name]).sum())
    return changed


def _resolution(module: torch.nn.Module) -> float:
    return max((torch.finfo(p.dtype).eps for p in module.parameters() if p.is_floating_point()), default=0.0)


def _precision(module: torch.nn.Module) -> str:
    dtypes = dict.fromkeys(p.dtype for p in module.parameters() if p.is_floating_point())
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _refuse_random(dense: torch.nn.Module, examples: tuple[Any, ...]) -> None:
    inputs = tuple(pytree.tree_map(lambda x: _cast(x, torch.float64), examples))
    first, second = (_run(dense, inputs, "the masked dense network") for _ in range(2))
    same = [x.shape for x in first] == [x.shape for x in second]
    off = max((_distance(a, b)[1] for a, b in zip(first, second, strict=True)), default=0.0) if same else torch.inf
    if off > TOLERANCE[torch.float64]:
        raise SurgeryError(
            f"the dense network is not deterministic: run twice in evaluation mode on the same inputs, its outputs "
            f"differ by {off:.3g} of max|y|",
            expected="a network whose output depends on its input and weights only",
            fix="switch randomness off in evaluation mode, for example F.dropout(x, training=self.training)",
        )


def _samples(examples: tuple[Any, ...], dense: torch.nn.Module) -> tuple[list[Sample], tuple[str, ...]]:
    """Named inputs to compare on, and what could not be tried, in words."""
    samples: list[Sample] = [(f"the example inputs {_shapes(pytree.tree_leaves(examples))}", examples)]
    if not free_size(examples):
        return samples, ()  # token ids and the like: random numbers would not be inputs of this network
    generator = torch.Generator().manual_seed(_SEED)

    def draw(shapes: Shapes) -> Sample:
        inputs = random_inputs(examples, shapes, generator)
        return f"random inputs {_shapes(inputs)}", inputs

    own = tuple(x.shape for x in examples)
    samples.append(draw(own))
    batches = (draw(tuple(torch.Size([batch, *shape[1:]]) for shape in own)) for batch in _BATCHES)
    samples += [sample for sample in batches if _accepts(dense, sample[1])]
    larger = [draw(shapes) for shapes in slightly_larger(own)]
    taken = next((sample for sample in larger if _accepts(dense, sample[1])), None)
    if taken is not None:
        return [*samples, taken], ()
    tried = " or ".join(_shapes(inputs) for _, inputs in larger)
    return samples, (f"no other spatial size (the dense network does not run at {tried})",) if larger else ()


def _accepts(dense: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> bool:
    """Whether the dense network runs at this size; some have theirs written into the code."""
    try:
        _run(dense, inputs, "the masked dense network")
    except SurgeryError:
        return False
    return True


@torch.no_grad()
def _run(module: torch.nn.Module, inputs: tuple[Any, ...], what: str) -> list[torch.Tensor]:
    try:
        outputs = module(*(x.clone() if isinstance(x, torch.Tensor) else x for x in inputs))
    except Exception as problem:
        # Any error of the user's own forward() means the same here: this network does not run.
        raise _refusal(f"{what} does not run: {str(problem).strip() or type(problem).__name__}") from problem
    return [y for y in pytree.tree_leaves(outputs) if isinstance(y, torch.Tensor)]


def _distance(reference: torch.Tensor, output: torch.Tensor) -> tuple[float, float]:
    if reference.numel() == 0:
        return 0.0, 0.0
    absolute = float((reference.double() - output.double()).abs().max())
    largest = float(reference.double().abs().max())
    return absolute, absolute / largest if largest else (0.0 if absolute == 0 else float("inf"))


def _top1(reference: torch.Tensor, output: torch.Tensor) -> tuple[int, int]:
    if reference.dim() < 2 or reference.numel() == 0:
        return 0, 0
    same = reference.argmax(dim=1) == output.argmax(dim=1)
    return int(same.sum()), same.numel()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _shapes(tensors: Any) -> str:
    return ", ".join(str(list(x.shape)) for x in tensors if isinstance(x, torch.Tensor))


def _refusal(given: str) -> SurgeryError:
    return SurgeryError(
        given,
        expected="finite outputs within 1e-05 · max|y| in float32 and 1e-10 · max|y| in float64",
        fix="no compact network is made; keep the masked dense one",
    )
