"""Networks to pack, masks of blocks for them, and the packed network compared with the masked one."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from small_networks import exactly_cut
from surgery_nets import Block, Step, randomised, unit
from torch import nn

from deploy_sparse.surgery import Compact, compact
from deploy_sparse.surgery._packed import Packed
from deploy_sparse.ticket import ModelRef, Provenance, Ticket
from deploy_sparse.ties import copied

Pairs = Sequence[tuple[Sequence[int], Sequence[int]]]  # rows and input channels of each block
KINDS = ("disjoint", "equal", "free", "empty", "positions")
SHAPE = (2, 3, 6, 6)


class Wide(nn.Module):
    """Stem, drawn steps and a head of two Linear layers, in float64."""

    def __init__(self, blocks: Sequence[Block], flatten: bool) -> None:
        super().__init__()
        self.stem = unit(3, Block("chain", 16))
        steps, width = [], 16
        for block in blocks:
            steps.append(Step(width, block))
            width = steps[-1].c_out
        self.steps = nn.Sequential(*steps)
        self.pool = nn.AdaptiveAvgPool2d(2 if flatten else 1)
        self.hidden = nn.Linear(width * (4 if flatten else 1), 32)
        self.fc = nn.Linear(32, 16)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.steps(self.stem(x)))
        return self.fc(torch.relu(self.hidden(torch.flatten(x, 1))))


@st.composite
def wide_networks(draw: Any) -> Callable[[], nn.Module]:
    """A factory of random networks whose layers are wide enough for blocks."""
    steps = st.builds(
        Block,
        st.sampled_from(("chain", "identity", "projection", "concat", "depthwise")),
        st.sampled_from((16, 32)),
        kernel=st.sampled_from((1, 3)),
        bias=st.booleans(),
        norm=st.booleans(),
        act=st.sampled_from(("relu", "gelu", "sigmoid", "none")),
    )
    blocks, flatten = draw(st.lists(steps, min_size=1, max_size=3)), draw(st.booleans())
    return lambda: Wide(blocks, flatten)


def block_mask(weight: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Bool, shaped like the weight: the blocks of these rows and whole input channels."""
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for rows, channels in pairs:
        mask[torch.tensor(list(rows)).unsqueeze(1), torch.tensor(list(channels))] = True
    return mask


def random_blocks(weight: torch.Tensor, kind: str, rng: random.Random) -> torch.Tensor:
    """Two blocks of at least 8 rows each; ``"empty"``: rows that are in none; ``"positions"``: of single taps."""
    out, channels = weight.shape[:2]
    rows, columns = rng.sample(range(out), out), rng.sample(range(channels), channels)
    split = out // 2 if kind in ("disjoint", "equal") else rng.randint(8, out - 8)
    parts = [rows[:split], rows[split:]]
    if kind == "empty":
        parts = [rows[:8], rows[8 : max(16, out - 3)]]
    if kind == "disjoint":
        return block_mask(weight, list(zip(parts, (columns[: channels // 2], columns[channels // 2 :]), strict=True)))
    if kind == "positions":
        mask = torch.zeros(weight.shape, dtype=torch.bool).flatten(1)
        for part in parts:
            chosen = rng.sample(range(mask.shape[1]), rng.randint(1, mask.shape[1]))
            mask[torch.tensor(part).unsqueeze(1), torch.tensor(chosen)] = True
        return mask.view(weight.shape)
    widths = [channels // 2] * 2 if kind == "equal" else [rng.randint(1, channels) for _ in parts]
    return block_mask(weight, [(part, rng.sample(columns, w)) for part, w in zip(parts, widths, strict=True)])


def blocks_everywhere(module: nn.Module, seed: int, kinds: Sequence[str] = KINDS) -> dict[str, torch.Tensor]:
    """Random blocks for most weights that are wide enough, of random kinds."""
    rng = random.Random(seed)
    masks = {}
    for name, weight in module.named_parameters():
        if weight.dim() > 1 and len(weight) >= 16 and weight.shape[1] > 1 and rng.random() < 0.8:
            masks[name] = random_blocks(weight, rng.choice(kinds), rng)
    return masks


def ticket_of(module: nn.Module, masks: Mapping[str, torch.Tensor], seed: int = 0, shape: Any = ()) -> Ticket:
    """A ticket of random weights with these masks."""
    weights = copied(randomised(module, seed).state_dict())
    return Ticket(weights, dict(masks), ModelRef("user factory", {}, tuple(shape)), Provenance("test"))


def pairs_ticket(factory: Callable[[], nn.Module], pairs: Mapping[str, Pairs]) -> Ticket:
    """A ticket of random weights, some of them with blocks."""
    module = factory()
    return ticket_of(module, {name: block_mask(module.get_parameter(name), own) for name, own in pairs.items()})


def exactly_packed(
    factory: Callable[[], nn.Module], made: Ticket, inputs: Any, others: Sequence[Any] = (), **options: Any
) -> Compact:
    """The packed network: equal to the masked one, and every packed layer holds its blocks and nothing else."""
    result = exactly_cut(factory, {}, inputs, others, made=made, format="packed", **options)
    options.pop("layers", None)
    cut = compact(made, factory, inputs, **options).module
    for path, layer in packed_layers(result).items():
        weight, plain = layer.unpack(), cut.get_submodule(path).weight
        assert weight.shape == plain.shape
        assert torch.equal(numbers(weight), numbers(plain))
        covered = sum(len(block.rows) * len(block.columns) for block in layer.packing.blocks)
        assert covered == len(numbers(plain))
    assert set(packed_layers(result)) == result.plan.shape.packed
    return result


def numbers(weight: torch.Tensor) -> torch.Tensor:
    """What is not zero, sorted."""
    return weight.detach()[weight != 0].sort().values


def packed_layers(result: Compact) -> dict[str, Packed]:
    """By path."""
    return {path: part for path, part in result.module.named_modules() if isinstance(part, Packed)}


def look_ups(result: Compact) -> list[str]:
    """Every look-up of the plan: ``"before x"``, ``"after x"`` of a packed layer, ``"after x"`` of its norm."""
    found = []
    for pack in result.plan.shape.packs:
        found += [f"before {pack.module}"] * pack.packing.gathers + [f"after {pack.module}"] * pack.packing.restores
    return found + [f"after {entry.module}" for entry in result.plan.shape.spreads]
