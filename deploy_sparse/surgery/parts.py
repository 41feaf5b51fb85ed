"""The small values a surgery plan consists of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ._positions import Positions
from .packing import Packing


@dataclass(frozen=True)
class Cut:
    """Positions that stay along one axis of one tensor of the state dict; ``size`` is the dense size of that axis."""

    name: str
    dim: int
    size: int
    kept: Positions


@dataclass(frozen=True)
class Fold:
    """Constants of removed channels taken up by a bias.

    Attributes:
        weight: the layer's weight.
        bias: the bias that changes.
        created: the layer had no bias before.
        channels: how many weight columns were folded.
    """

    weight: str
    bias: str
    created: bool
    channels: int


@dataclass(frozen=True)
class Carry:
    """Constants of removed channels taken up by one kept column of a weight, because a bias could not.

    Attributes:
        weight: the layer's weight.
        column: the column, counted over all groups of the dense layer; its channel holds a constant too.
        channels: how many removed columns went into it.
    """

    weight: str
    column: int
    channels: int


@dataclass(frozen=True)
class Rescale:
    """Rows of a layer multiplied by ``factor``: attention divides by the root of a head size that has shrunk.

    Attributes:
        weight: the layer's weight.
        bias: its bias, which is multiplied too, None where there is none.
        rows: positions in the dense weight.
        factor: the number.
    """

    weight: str
    bias: str | None
    rows: Positions
    factor: float


@dataclass(frozen=True)
class Attribute:
    """An integer attribute that the code reads a size from.

    Attributes:
        module: path of the module.
        name: the attribute.
        index: entry of a list or tuple of integers, None for a plain number.
        dense: its value in the dense network.
        compact: its value in the compact network.
    """

    module: str
    name: str
    index: int | None
    dense: int
    compact: int


@dataclass(frozen=True)
class KeptNorm:
    """A norm replaced by one that keeps the dense network's statistics.

    Attributes:
        module: path of the norm.
        kind: ``"layer"``, ``"rms"`` or ``"group"``.
        dim: channel axis of its input.
        groups: groups that stay.
        dense: channels of one group in the dense network.
        kept: channels of one group that stay.
        eps: added to the variance; None is the precision's own.
    """

    module: str
    kind: Literal["layer", "rms", "group"]
    dim: int
    groups: int
    dense: int
    kept: int
    eps: float | None


Kind = Literal["pinned", "leak", "carrier", "aligned", "size", "product", "last", "shared"]


@dataclass(frozen=True)
class Stay:
    """Channels that stay although the masks empty them (``"pinned"``: whether or not they do), and why.

    ``kind``: ``"pinned"`` the network's structure needs them, ``"leak"`` their constant cannot be carried,
    ``"carrier"`` they carry the constants of others, ``"aligned"`` they fill the width up to the asked-for multiple,
    ``"size"`` the code states the size, ``"product"`` others at the same position of a split axis stay, ``"last"`` a
    tensor must keep one, ``"shared"`` some layers of a shortcut write nothing into them, and others do.
    """

    kind: Kind
    channels: Positions
    reason: str


@dataclass(frozen=True)
class GroupPlan:
    """One channel group: its name, dense size, channels that stay, why emptied channels stay, and the tensors it spans.

    ``members`` are names of the state dict.
    """

    name: str
    size: int
    kept: Positions
    stays: tuple[Stay, ...] = ()
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """A weight's shape in the dense and in the compact network."""

    name: str
    dense: tuple[int, ...]
    compact: tuple[int, ...]


@dataclass(frozen=True)
class Spread:
    """A layer that writes fewer rows than its output has channels, see :mod:`.spread`.

    Attributes:
        module: path of the layer.
        places: for each channel of its output the row that holds it.
    """

    module: str
    places: tuple[int, ...]


@dataclass(frozen=True)
class Order:
    """The positions along one axis of one tensor in a new order.

    Attributes:
        name: of the tensor.
        dim: the axis.
        positions: for each new position the one before, in the network with the cuts made.
    """

    name: str
    dim: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Pack:
    """A layer that runs as dense blocks.

    Attributes:
        module: path of the layer.
        packing: its blocks, in the narrowed and renumbered network.
    """

    module: str
    packing: Packing


@dataclass(frozen=True)
class Blueprint:
    """Everything that changes the shape of a network, without weights.

    Attributes:
        cuts: positions that stay, for every tensor axis that loses some.
        folds: biases that take up constants of removed channels.
        attributes: integers that the code reads.
        norms: norms replaced by ones that keep the dense statistics.
        spreads: layers that compute rows of zeros once for all channels of a shortcut that need one.
        attention: paths of ``nn.MultiheadAttention`` replaced by one without fixed sizes.
        orders: channels renumbered for packed layers, after the cuts.
        packs: layers that run as dense blocks.
    """

    cuts: tuple[Cut, ...]
    folds: tuple[Fold, ...] = ()
    attributes: tuple[Attribute, ...] = ()
    norms: tuple[KeptNorm, ...] = ()
    attention: tuple[str, ...] = ()
    spreads: tuple[Spread, ...] = ()
    orders: tuple[Order, ...] = ()
    packs: tuple[Pack, ...] = ()

    def __repr__(self) -> str:
        return f"Blueprint({', '.join(f'{name}: {len(parts)}' for name, parts in vars(self).items() if parts)})"

    @property
    def packed(self) -> frozenset[str]:
        """Paths of the packed layers."""
        return frozenset(pack.module for pack in self.packs)
