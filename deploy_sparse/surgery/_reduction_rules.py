"""Rules for reductions, softmax, pooling and interpolation."""

from __future__ import annotations

from dataclasses import replace

import torch

from ._axes import Ledger, Mixing
from ._nodes import Node
from ._shape_rules import Result, rounded, rounds
from ._values import UNTRACKED, Value, compressed, even, lean, unknown_constant, untracked, varying
from .trace import arguments, operation, place

ADD_UP = frozenset({"sum", "norm", "linalg_vector_norm"})
POOL_AVERAGE = frozenset(f"avg_pool{n}d" for n in (1, 2, 3))


def reduce(ledger: Ledger, node: Node) -> Result:
    """Sums, means, norms and extremes.

    Over positions a constant stays where it is the same over all of them; their number changes with the input's size,
    so a sum keeps zero only. Over channels only sums and norms let any go, and only those that are zero.
    """
    name, _ = operation(node)
    given = arguments(node)
    value = ledger.value(given["self"])
    dims = given.get("dim")
    rank = len(value.shape)
    dims = [dims] if isinstance(dims, int) else dims
    over = {d % rank for d in dims} if dims else set(range(rank))
    outputs = node.meta["val"]
    single = not isinstance(outputs, list | tuple)
    shape = outputs.shape if single else outputs[0].shape
    atoms, constant = _collapsed(ledger, node, value, over), even(value.constant, over)
    if name in ADD_UP or name not in ("mean", "amax", "amin", "max", "min"):
        constant = (
            torch.where(constant == 0, constant, torch.nan) if name in ADD_UP else torch.full_like(constant, torch.nan)
        )
    ledger.lose(value.atoms, value.constant, constant, f"would depend on the number of positions in {place(node)}")
    if rounds(given["self"].meta["val"].dtype, (outputs if single else outputs[0]).dtype):
        ledger.lose(value.atoms, constant, rounded(constant), f"would be rounded by {place(node)}")
        constant = rounded(constant)
    # The reduced axes, of size 1 by now, go or stay as ``shape`` says.
    made = Value(compressed(atoms.reshape(shape)), compressed(constant.reshape(shape)), value.producer, value.why)
    return made if single else (made, *(Value(made.atoms, unknown_constant(shape), why=value.why) for _ in outputs[1:]))


def _collapsed(ledger: Ledger, node: Node, value: Value, over: set[int]) -> torch.Tensor:
    """The channels left after a reduction over ``over``, which have size 1 in the result."""
    axes = set(varying(value.atoms))
    summed = over & axes
    rest = [d for d in sorted(over) if d not in summed]
    atoms = lean(value.atoms)
    if not summed:
        return value.atoms.amin(dim=rest, keepdim=True) if rest else value.atoms
    where = place(node)
    order = arguments(node).get("ord", arguments(node).get("p", 2))
    if operation(node)[0] not in ADD_UP or (isinstance(order, int | float) and order <= 0):
        ledger.fix(value, summed, f"channels are mixed by {where}")
    kept = sorted(axes - summed)
    sizes = [value.shape[d] if d in kept else 1 for d in range(len(value.shape))]
    if kept:
        target = ledger.atoms.fresh(torch.Size(sizes).numel()).reshape(sizes)
        ledger.link([atoms, target], kept)
    else:
        target = torch.full(sizes, UNTRACKED)
    harmless = lean(value.constant) == 0
    positions = [d for d in range(harmless.dim()) if d not in axes]
    harmless = harmless.all(dim=tuple(positions), keepdim=True) if positions else harmless
    ledger.mixings.append(Mixing(atoms, target, harmless, where))
    return target.expand([1 if d in over else n for d, n in enumerate(value.shape)])


def along_axis(ledger: Ledger, node: Node) -> Result:
    """Softmax and running sums: every position along the axis counts, so none of its channels may go."""
    given = arguments(node)
    value = ledger.value(given["self"])
    ledger.fix(value, {given["dim"]}, f"channels are mixed by {place(node)}")
    last = given["dim"] % len(value.shape) == len(value.shape) - 1
    one = last and operation(node)[0] in ("softmax", "_softmax")
    made = replace(value, constant=unknown_constant(value.shape), scales_with=None, sums_to_one=one)
    ledger.lose(value.atoms, value.constant, made.constant, f"would be mixed by {place(node)}")
    outputs = node.meta["val"]
    if isinstance(outputs, list | tuple):
        return (made, *(untracked(o.shape, f"positions from {place(node)}") for o in outputs[1:]))
    return made


def pool(ledger: Ledger, node: Node) -> Result:
    """Pooling and interpolation over positions. A constant stays, unless zeros of the padding are averaged in."""
    name, _ = operation(node)
    given = arguments(node)
    value = ledger.value(node.args[0])
    width = len(value.shape) - 2 if "upsample" in name else int(name.split("pool")[1][0])
    spatial = set(range(len(value.shape) - width, len(value.shape)))
    ledger.fix(value, spatial, f"channels lie along the axes pooled by {place(node)}")
    constant = even(value.constant, spatial)
    if name in POOL_AVERAGE:
        padding = given["padding"]
        padded = any(padding) if isinstance(padding, list | tuple) else bool(padding)
        if (padded and given["count_include_pad"]) or given.get("divisor_override"):
            constant = torch.where(constant == 0, constant, torch.nan)
    if name.startswith("lp_"):
        constant = torch.where(constant == 0, constant, torch.nan)
    ledger.lose(value.atoms, value.constant, constant, f"would meet the zero padding of {place(node)}")
    outputs = node.meta["val"]
    single = not isinstance(outputs, list | tuple)
    shape = outputs.shape if single else outputs[0].shape
    atoms = value.atoms
    for d in spatial:
        atoms = atoms.narrow(d, 0, 1)
    result = Value(atoms.expand(shape), compressed(constant.expand(shape)), value.producer, value.why)
    return result if single else (result, Value(result.atoms, unknown_constant(shape), why=value.why))
