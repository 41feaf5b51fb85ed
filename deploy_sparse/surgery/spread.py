"""Layers that write only some channels of a residual stream, and repeat a row of zeros for the others.

Where the masks of a shortcut disagree, a channel stays in the stream because one layer still writes it. The others have
a row of zeros there; they compute it once and look it up (an index-add of their rows into the stream).
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

L = TypeVar("L", bound=nn.Module)


class _Spread(nn.Module):
    """Adds the look-up to a layer.

    Attributes:
        places: for each channel of the output the row that holds it, int64 ``[channels]``.
        axis: where the channels lie in the output.
    """

    places: torch.Tensor
    axis: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As the layer's own, with ``len(places)`` channels."""
        rows: torch.Tensor = super().forward(input)
        return rows.index_select(self.axis, self.places)

    def extra_repr(self) -> str:
        """The layer's own and the width of the output."""
        return f"{super().extra_repr()}, spread over {len(self.places)} channels"


class SpreadConv1d(_Spread, nn.Conv1d):
    """See :mod:`.spread`."""


class SpreadConv2d(_Spread, nn.Conv2d):
    """See :mod:`.spread`."""


class SpreadConv3d(_Spread, nn.Conv3d):
    """See :mod:`.spread`."""


class SpreadLinear(_Spread, nn.Linear):
    """See :mod:`.spread`."""


class SpreadBatchNorm2d(_Spread, nn.BatchNorm2d):
    """See :mod:`.spread`. Its input's rows lie as a packed layer computed them; its output's as the stream has them."""


_KINDS: dict[type[nn.Module], type[_Spread]] = {
    nn.Conv1d: SpreadConv1d,
    nn.Conv2d: SpreadConv2d,
    nn.Conv3d: SpreadConv3d,
    nn.Linear: SpreadLinear,
    nn.BatchNorm2d: SpreadBatchNorm2d,
}


def spreadable(layer: nn.Module) -> bool:
    """Whether there is a spread form of the layer; subclasses with code of their own have none."""
    return type(layer) in _KINDS


def spread(layer: nn.Module, places: tuple[int, ...]) -> nn.Module:
    """The layer with its rows looked up at ``places``; it shares the layer's parameters.

    Args:
        layer: an ``nn.Conv1d``, ``Conv2d``, ``Conv3d`` or ``Linear``, or an ``nn.BatchNorm2d`` behind one.
        places: the row of each output channel.
    """
    kind = _KINDS[type(layer)]
    made: Any = kind.__new__(kind)
    made.__dict__ = dict(vars(layer))
    made._buffers = dict(layer._buffers)
    device = next(x.device for x in (*layer.parameters(), *layer.buffers(), torch.empty(0)))
    made.register_buffer("places", torch.tensor(places, dtype=torch.int64, device=device))
    made.axis = -1 if isinstance(layer, nn.Linear) else 1
    if not isinstance(layer, nn.BatchNorm2d):
        setattr(made, "out_features" if isinstance(layer, nn.Linear) else "out_channels", len(places))
    return made  # type: ignore[no-any-return]
