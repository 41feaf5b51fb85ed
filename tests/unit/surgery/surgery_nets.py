"""Small random networks, tickets and masks for the surgery tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from deploy_sparse.structure import ChannelGroup
from deploy_sparse.surgery import channel_groups
from deploy_sparse.ticket import ModelRef, Provenance, Ticket

SHAPE = (3, 8, 8)


@dataclass(frozen=True)
class Block:
    """One step of a random network; ``width`` new channels, or a pool when ``kind`` says so."""

    kind: str
    width: int
    kernel: int = 3
    padded: bool = True
    bias: bool = False
    norm: bool = True
    act: str = "relu"


ACTS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "inplace": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "none": nn.Identity,
}


def unit(c_in: int, block: Block, groups: int = 1) -> nn.Sequential:
    padding = block.kernel // 2 if block.padded else 0
    layers: list[nn.Module] = [
        nn.Conv2d(c_in, block.width, block.kernel, padding=padding, bias=block.bias, groups=groups)
    ]
    if block.norm:
        layers.append(nn.BatchNorm2d(block.width))
    return nn.Sequential(*layers, ACTS[block.act]())


class Step(nn.Module):
    def __init__(self, c_in: int, block: Block) -> None:
        super().__init__()
        self.kind, same = block.kind, Block(**{**vars(block), "padded": True})
        self.c_out = block.width
        if block.kind == "chain":
            self.body = unit(c_in, block)
        elif block.kind == "identity":  # residual sum without projection
            self.body, self.c_out = unit(c_in, Block(**{**vars(same), "width": c_in})), c_in
        elif block.kind == "projection":
            self.body = nn.Sequential(unit(c_in, same), unit(block.width, same))
            self.short = nn.Conv2d(c_in, block.width, 1, bias=block.bias)
        elif block.kind == "concat":
            self.body, self.c_out = unit(c_in, same), block.width + c_in
        elif block.kind == "depthwise":
            self.body, self.c_out = unit(c_in, Block(**{**vars(same), "width": c_in}), groups=c_in), c_in
        else:
            pools = {"max": nn.MaxPool2d(2, 1, 1), "avg": nn.AvgPool2d(2, 1), "avgpad": nn.AvgPool2d(3, 1, 1)}
            self.body, self.c_out = pools[block.kind], c_in

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "identity":
            return self.body(x) + x
        if self.kind == "projection":
            y = self.body(x)
            y += self.short(x)
            return torch.relu_(y)
        if self.kind == "concat":
            return torch.cat([x, self.body(x)], dim=1)
        return self.body(x)


class RandomNet(nn.Module):
    """Stem, drawn steps, then global pooling or flattening, a hidden Linear and the classifier."""

    def __init__(self, blocks: Sequence[Block], flatten: bool) -> None:
        super().__init__()
        self.stem = unit(3, Block("chain", 5))
        steps, width = [], 5
        for block in blocks:
            steps.append(Step(width, block))
            width = steps[-1].c_out
        self.steps = nn.Sequential(*steps)
        self.pool = nn.AdaptiveAvgPool2d(2 if flatten else 1)
        self.hidden = nn.Linear(width * (4 if flatten else 1), 6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.steps(self.stem(x)))
        return self.fc(torch.relu(self.hidden(torch.flatten(x, 1))))


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and BatchNorm statistics away from their neutral values, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            if name.endswith("running_var"):
                tensor.copy_(noise.abs() + 0.5)
            elif tensor.dim() > 1:
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
            else:
                tensor.copy_(noise * 0.5 + 0.3)
    return module


def ticket(module: nn.Module, masks: Mapping[str, torch.Tensor], shape: tuple[int, ...] = SHAPE) -> Ticket:
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    return Ticket(weights, dict(masks), ModelRef("user factory", {}, shape), Provenance("test"))


def silent_masks(
    module: nn.Module, groups: Sequence[ChannelGroup], drop: Callable[[ChannelGroup], Sequence[int]]
) -> dict[str, torch.Tensor]:
    """Masks that empty the channels ``drop(group)`` everywhere: rows, biases, norms, shared parameters, columns."""
    state, masks = module.state_dict(), {}
    for group in groups:
        dropped = set(drop(group))
        if group.pinned is not None or not dropped:
            continue
        for part in group.slices():
            if part in group.statistics:
                continue
            mask = masks.setdefault(part.name, torch.ones_like(state[part.name], dtype=torch.bool))
            positions = [i for i, channel in enumerate(part.channels) if channel in dropped]
            mask.index_fill_(part.dim, torch.tensor(positions, dtype=torch.int64), False)
    return masks


def rows_masked(module: nn.Module, rows: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """Masks that empty only rows of weights: biases and norms stay alive."""
    state, masks = module.state_dict(), {}
    for name, dropped in rows.items():
        masks[name] = torch.ones_like(state[name], dtype=torch.bool)
        masks[name][list(dropped)] = False
    return masks


def groups_by_name(module: nn.Module, shape: tuple[int, ...] = SHAPE) -> dict[str, ChannelGroup]:
    return {group.name: group for group in channel_groups(module, torch.zeros(2, *shape))}


def outputs(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module.eval()(x)


def masked(factory: Callable[[], nn.Module], made: Ticket) -> nn.Module:
    module = factory()
    module.load_state_dict(made.masked_weights())
    return module.eval()
