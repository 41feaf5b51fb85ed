"""Does the compact network compute what the masked one does? Measured, in float32 and float64, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import SurgeryError
from ._trials import (
    COMPACT,
    MASKED,
    Outputs,
    Precisions,
    Sample,
    cast_inputs,
    in_precision,
    refusal,
    run,
    shapes_of,
    trials,
)
from .graph import Inputs, as_tuple

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Largest accepted ``max|Δ| / max|y|`` by the precision of the outputs."""

_OWN_ERRORS = 4  # how many times the dense network's own error in float32 is allowed
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
    dense: nn.Module,
    compact: nn.Module,
    example_inputs: Inputs,
    *,
    exact: nn.Module | None = None,
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
    examples = as_tuple(example_inputs)
    fine = _finest(dense, examples)
    reference = in_precision(dense, fine)
    found, untried = trials(examples, reference, fine)
    if fine != torch.float64:
        untried = (*untried, "not in float64, which the network's own casts do not allow")
    samples, expected = [sample for sample, _ in found], [outputs for _, outputs in found]
    with Precisions() as seen:  # the network's own casts may round what is in float64
        again = run(reference, cast_inputs(examples, fine), MASKED)
    _refuse_random(expected[0], again)
    del reference
    within = _allowed(seen.coarsest, fine)
    changed = 0 if exact is None else _rounded(compact, exact)
    delivered, rounding = compact, None
    if exact is not None and changed:
        double = _deviation(expected, exact, samples, fine, [within] * len(samples))
        limit = max(within, _allowed(_resolution(compact), torch.float32))
        after = _deviation(expected, compact, samples, fine, [limit] * len(samples))
        rounding = Rounding(changed, _precision(compact), after)
        delivered = exact if limit > TOLERANCE[torch.float32] else compact
    else:
        double = _deviation(expected, compact, samples, fine, [within] * len(samples))
    network = in_precision(dense, torch.float32)
    coarse = [run(network, cast_inputs(inputs, torch.float32), MASKED) for _, inputs in samples]
    # Where the dense network itself is that far off in float32, no other order of sums can be closer.
    own = [max(_distance(a, b)[1] for a, b in zip(*pair, strict=True)) for pair in zip(expected, coarse, strict=True)]
    limits = [max(_allowed(seen.coarsest, torch.float32), _OWN_ERRORS * off) for off in own]
    single = _deviation(coarse, delivered, samples, torch.float32, limits)
    return Parity(single, double, (*(name for name, _ in samples), *untried), rounding)


def _deviation(
    expected: Sequence[Outputs],
    compact: nn.Module,
    samples: Sequence[Sample],
    dtype: torch.dtype,
    limits: Sequence[float],
) -> Deviation:
    network = in_precision(compact, dtype)
    max_abs = max_rel = 0.0
    agreed = total = 0
    for (name, inputs), references, limit in zip(samples, expected, limits, strict=True):
        actual = run(network, cast_inputs(inputs, dtype), COMPACT)
        if [y.shape for y in actual] != [y.shape for y in references]:
            raise refusal(
                f"the compact network's outputs have shapes {shapes_of(actual)} on {name}, the masked network's "
                f"{shapes_of(references)}"
            )
        for reference, output in zip(references, actual, strict=True):
            for what, tensor in (("masked dense", reference), ("compact", output)):
                if not bool(torch.isfinite(tensor).all()):
                    raise refusal(f"the {what} network's output on {name} has entries that are NaN or infinite")
            absolute, relative = _distance(reference, output)
            allowed = limit if reference.dtype == dtype else max(limit, TOLERANCE[torch.float32])
            if relative > allowed:
                raise refusal(
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
            raise refusal(f"{name!r} of the compact network is not its float64 counterpart, rounded")
        changed += int((tensor != unrounded[name]).sum())
    return changed


def _allowed(resolution: float, dtype: torch.dtype = torch.float64) -> float:
    """The tolerance in ``dtype`` where the coarsest numbers have this resolution."""
    if dtype == torch.float64 and resolution <= torch.finfo(torch.float64).eps:
        return TOLERANCE[torch.float64]
    coarse = _UNITS * resolution if resolution > torch.finfo(torch.float32).eps else 0.0
    return max(TOLERANCE[torch.float32], coarse)


def _finest(dense: nn.Module, examples: tuple[Any, ...]) -> torch.dtype:
    """float64, or float32 for networks that cast to it on their own and then read weights."""
    for dtype in (torch.float64, torch.float32):
        try:
            run(in_precision(dense, dtype), cast_inputs(examples, dtype), MASKED)
        except SurgeryError:
            continue
        return dtype
    return torch.float64


def _refuse_random(first: Outputs, second: Outputs) -> None:
    same = [x.shape for x in first] == [x.shape for x in second]
    off = max((_distance(a, b)[1] for a, b in zip(first, second, strict=True)), default=0.0) if same else torch.inf
    if off > TOLERANCE[torch.float64]:
        raise SurgeryError(
            f"the dense network is not deterministic: run twice in evaluation mode on the same inputs, its outputs "
            f"differ by {off:.3g} of max|y|",
            expected="a network whose output depends on its input and weights only",
            fix="switch randomness off in evaluation mode, for example F.dropout(x, training=self.training)",
        )


def _resolution(module: nn.Module) -> float:
    return max((float(torch.finfo(p.dtype).eps) for p in module.parameters() if p.is_floating_point()), default=0.0)


def _precision(module: nn.Module) -> str:
    dtypes = dict.fromkeys(p.dtype for p in module.parameters() if p.is_floating_point())
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


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
