"""Networks of a few layers written next to their test, and the compact network compared with the masked one."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from surgery_nets import masked, randomised
from torch import nn
from torch.utils import _pytree as pytree

from deploy_sparse.surgery import Compact, compact
from deploy_sparse.ticket import ModelRef, Provenance, Ticket

Rows = Sequence[int] | tuple[int, Sequence[int]]


def net(forward: Callable[..., Any], **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    """A factory of float64 networks with these parts, which are made anew by every call."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, make in parts.items():
                setattr(self, name, make())
            self.double()

        def forward(self, *inputs: Any) -> Any:
            return forward(self, *inputs)

    return Net


def conv(c_in: int, c_out: int) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(c_in, c_out, 1)


def linear(c_in: int, c_out: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(c_in, c_out)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1]), dtype=torch.float64)


def ticket_without(module: nn.Module, rows: Mapping[str, Rows], seed: int = 0) -> Ticket:
    """A ticket of random weights whose masks empty rows, or ``(axis, positions)``, of some of them."""
    weights = {name: tensor.clone() for name, tensor in randomised(module, seed).state_dict().items()}
    masks = {}
    for name, gone in rows.items():
        axis, positions = gone if isinstance(gone, tuple) else (0, gone)
        masks[name] = torch.ones_like(weights[name], dtype=torch.bool)
        masks[name].index_fill_(axis, torch.tensor(list(positions)), False)
    return Ticket(weights, masks, ModelRef("user factory", {}), Provenance("test"))


def exactly_cut(
    factory: Callable[[], nn.Module],
    rows: Mapping[str, Rows],
    inputs: Any,
    others: Sequence[Any] = (),
    made: Ticket | None = None,
    limit: float = 1e-12,
    **options: Any,
) -> Compact:
    """The compact network, after comparing it with the factory's masked one on ``inputs`` and on ``others``."""
    made = made or ticket_without(factory(), rows)
    result = compact(made, factory, inputs, **options)
    dense = masked(factory, made)
    for given in (inputs, *others):
        given = given if isinstance(given, tuple) else (given,)
        with torch.no_grad():
            expected, found = (tensors(module(*given)) for module in (dense, result.module))
        assert expected
        assert [y.shape for y in expected] == [y.shape for y in found]
        for y, z in zip(expected, found, strict=True):
            off = float((y.double() - z.double()).abs().max() / y.double().abs().max())
            assert off <= limit, f"{off:.1e} of max|y| off at {[tuple(getattr(x, 'shape', ())) for x in given]}"
    return result


def tensors(found: Any) -> list[torch.Tensor]:
    """Every tensor in an output, also in dataclasses and plain objects."""
    if dataclasses.is_dataclass(found) or isinstance(found, types.SimpleNamespace):
        found = list(vars(found).values())
    leaves = pytree.tree_leaves(found)
    if len(leaves) == 1 and leaves[0] is found:
        return [found] if isinstance(found, torch.Tensor) else []
    return [tensor for leaf in leaves for tensor in tensors(leaf)]


def kept(result: Compact, name: str) -> tuple[int, ...]:
    """Rows of a weight that are left."""
    return next((cut.kept for cut in result.plan.cuts if (cut.name, cut.dim) == (name, 0)), ())


def reasons(result: Compact) -> str:
    """Every reason why channels stay, but for those of the network's outputs."""
    return "; ".join(
        f"{stay.kind} {list(stay.channels)}: {stay.reason}"
        for group in result.plan.groups
        for stay in group.stays
        if stay.reason != "network output"
    )
