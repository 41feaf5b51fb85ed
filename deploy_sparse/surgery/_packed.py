"""What block-packed layers have in common: weights by block, the orders of channels, and the look-ups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import SurgeryError
from .packing import Packing


class Packed(nn.Module):
    """A layer that holds the blocks of a weight and computes only them.

    Attributes:
        packing: the format.
        weight: all blocks below each other, ``[blocks · rows, columns, ...]``, where one node computes them.
        weights: one weight for each block, ``[rows, columns, ...]``, where not.
        bias: ``[out_channels]`` in the order of the output, or None.
        columns: int64, where each block reads, see :attr:`Packing.columns`.
        rows: int64, see :attr:`Packing.rows`.
        places: int64, see :attr:`Packing.places`; only where the layer restores the order of its rows.
    """

    weight: nn.Parameter
    weights: nn.ParameterList
    bias: nn.Parameter | None
    columns: torch.Tensor
    rows: torch.Tensor

    def __init__(
        self,
        packing: Packing,
        *,
        stacked: bool,
        tail: tuple[int, ...],
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Weights of zeros. ``stacked``: one weight holds all blocks; ``tail``: its axes behind rows and columns."""
        super().__init__()
        self.packing = packing
        self._stacked, self._tail, self._sizes = stacked, tail, packing.sizes
        self._padded = any(
            (tall, wide) != (len(block.rows), len(read))
            for block, read, (tall, wide) in zip(packing.blocks, packing.reads, self._sizes, strict=True)
        )
        self._gathers, self._restores = packing.gathers, packing.restores
        self._appends = packing.restore and len(packing.rows) > sum(tall for tall, _ in self._sizes)
        weights = [
            nn.Parameter(torch.zeros(tall, wide, *tail, device=device, dtype=dtype)) for tall, wide in self._sizes
        ]
        if stacked:
            self.weight = nn.Parameter(torch.cat(list(weights)).detach())
        else:
            self.weights = nn.ParameterList(weights)
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(packing.out_channels, device=device, dtype=dtype)) if bias else None
        )
        for name, index in self._indices().items():
            self.register_buffer(name, torch.tensor(index, dtype=torch.int64, device=device))

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and not self.__dict__.get("_stacked", True):  # code that asks for its type or shape
            return self.unpack()
        return super().__getattr__(name)

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.packing.in_channels

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.packing.out_channels

    def unpack(self) -> torch.Tensor:
        """The dense weight in dense order, ``[out, in, *kernel]``, with zeros outside of the blocks."""
        packing, parts = self.packing, self._parts(list(self._held().values()))
        dense = parts[0].new_zeros(packing.out_channels, packing.in_channels * packing.taps)
        for block, part in zip(packing.blocks, parts, strict=True):
            rows, columns = (torch.tensor(index, device=dense.device) for index in (block.rows, block.columns))
            dense = dense.index_put((rows.unsqueeze(1), columns), part.flatten(1))
        return dense.view(packing.out_channels, packing.in_channels, *packing.kernel)

    def unpack_bias(self) -> torch.Tensor | None:
        """The bias in dense order, ``[out]``."""
        if self.bias is None or self.packing.restore:
            return self.bias
        return self.bias.new_zeros(self.out_channels).index_copy(0, self.rows, self.bias)

    def _indices(self) -> dict[str, tuple[int, ...]]:
        """What the buffers hold."""
        found = {"columns": self.packing.columns, "rows": self.packing.rows}
        if self.packing.form == "positions":  # the unrolled input has one tap behind the other
            taps, channels = self.packing.taps, self.in_channels
            found["columns"] = tuple(column % taps * channels + column // taps for column in found["columns"])
        return {**found, "places": self.packing.places} if self._restores else found

    @torch.no_grad()
    def _fill_(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Take the blocks of a dense weight ``[out, in, *kernel]`` and a dense bias ``[out]``."""
        packing = self.packing
        packing.check_weight(weight.shape, None if bias is None else bias.shape)
        matrix = weight.flatten(1)
        for block, part in zip(packing.blocks, self._parts(list(self._held().values())), strict=True):
            rows, columns = (torch.tensor(index, device=matrix.device) for index in (block.rows, block.columns))
            part.copy_(matrix.index_select(0, rows).index_select(1, columns).view_as(part))
        if bias is not None and self.bias is not None:
            self.bias.copy_(bias if packing.restore else bias.index_select(0, self.rows))

    def _held(self) -> dict[str, torch.Tensor]:
        """The weights by name: one of all blocks, or one for each."""
        if self._stacked:
            return {"weight": self.weight}
        return {f"weights.{number}": weight for number, weight in enumerate(self.weights)}

    def _parts(self, held: list[torch.Tensor]) -> list[torch.Tensor]:
        """Each block's weights without padding, ``[rows, columns, *tail]``; views of ``held``."""
        packing, sizes = self.packing, self._sizes
        split = held[0].split([tall for tall, _ in sizes]) if self._stacked else held  # type: ignore[no-untyped-call]
        return [
            one[: len(block.rows), : len(read)]
            for block, read, one in zip(packing.blocks, packing.reads, split, strict=True)
        ]

    def _kernels(self) -> list[torch.Tensor]:
        """The weights to compute with, padding included: one of all blocks, or one for each.

        Where gradients are recorded the padding is made anew, so that it takes none and stays zero.
        """
        held = list(self._held().values())
        return self._repadded(held) if self._padded and torch.is_grad_enabled() else held

    def _repadded(self, held: list[torch.Tensor]) -> list[torch.Tensor]:
        beyond = [0, 0] * len(self._tail)
        made = [
            F.pad(part, [*beyond, 0, wide - part.shape[1], 0, tall - part.shape[0]])
            for part, (tall, wide) in zip(self._parts(held), self._sizes, strict=True)
        ]
        return [torch.cat(made)] if self._stacked else made

    def _convolved(self, x: torch.Tensor, axis: int, **options: Any) -> torch.Tensor:
        """The convolution of all blocks: ``x`` has dense channels at ``axis``, the result those of the output."""
        kernels, bias = self._kernels(), self._early_bias()
        if self._stacked:
            x = x.index_select(axis, self.columns) if self._gathers else x
            y = F.conv2d(x, kernels[0], bias, groups=len(self._sizes), **options)
        else:
            outputs, row, column = [], 0, 0
            for kernel, (tall, wide) in zip(kernels, self._sizes, strict=True):
                read = x.index_select(axis, self.columns.narrow(0, column, wide))
                part = None if bias is None else bias.narrow(0, row, tall)
                outputs.append(F.conv2d(read, kernel, part, **options))
                row, column = row + tall, column + wide
            y = joined(outputs, axis)
        behind = y.dim() - axis - 1
        if self._appends:
            y = F.pad(y, [*[0, 0] * behind, 0, 1])
        if self._restores:
            y = y.index_select(axis, self.get_buffer("places"))
        return y if self.bias is None or bias is not None else y + self.bias.view(-1, *[1] * behind)

    def _early_bias(self) -> torch.Tensor | None:
        """The bias in packed order; None where it is to be added at the end, as rows in no block have one too."""
        if self.bias is None or not self._restores:
            return self.bias
        return None if self.packing.empty_rows else self.bias.index_select(0, self.rows.clamp(min=0))

    def _check_input(self, x: torch.Tensor, axis: int, axes: str) -> None:
        """A look-up would take any wider input without complaint."""
        if x.shape[axis] != self.in_channels:
            raise SurgeryError(
                f"an input of shape {list(x.shape)}",
                expected=f"{axes} with {self.in_channels} channels",
                fix="feed what the dense layer takes",
            )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name, index in self._indices().items():
            given = state_dict.get(prefix + name)
            if given is not None and not given.is_meta and tuple(given.tolist()) != index:
                raise SurgeryError(
                    f"the state dict's {prefix + name!r} is of another packing",
                    expected=f"the order of this layer: {self.extra_repr()}",
                    fix="make the layer with the packing that was saved with the state dict",
                )
        self._check_padding({name: state_dict.get(prefix + name) for name in self._held()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_padding(self, given: Mapping[str, torch.Tensor | None]) -> None:
        """Refuse weights in the padding: the dense weight has none there. What is missing is refused later."""
        ours = self._held()
        found = [x for name, x in given.items() if x is not None and not x.is_meta and x.shape == ours[name].shape]
        if not self._padded or len(found) < len(ours):
            return
        inside = self._repadded([torch.ones_like(x) for x in found])
        if any(bool(x[mask == 0].any()) for x, mask in zip(found, inside, strict=True)):
            raise SurgeryError(
                "a state dict with weights other than zero in the padding of blocks",
                expected="zeros there, as the layer itself saves them",
                fix="save the state dict of the packed layer again, or pack the dense weight",
            )

    def _like(self, layer: nn.Module) -> Self:
        """In the mode of a dense layer, and with its choice of what is trained."""
        for name, parameter in self.named_parameters():
            source = layer.get_parameter("bias" if name == "bias" else "weight")
            parameter.requires_grad_(source.requires_grad)
        return self.train(layer.training)

    def _format(self) -> str:
        """For ``extra_repr``: the form, the blocks, and which orders the layer changes itself."""
        sizes = list(dict.fromkeys(self._sizes))
        shown = ", ".join(f"{tall}×{wide}" for tall, wide in sizes[:3]) + (", …" if len(sizes) > 3 else "")
        orders = [name for name, has in (("gather", self._gathers), ("restore", self._restores)) if has]
        return ", ".join([f"{self.packing.form}: {len(self._sizes)} blocks of {shown}", *orders])


def joined(parts: list[torch.Tensor], axis: int) -> torch.Tensor:
    """The parts behind each other along ``axis``."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def check_layer(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Refuse anything but a plain layer of that kind, which alone computes what the packed one does."""
    computed = [name for name in ("weight", "bias") if name not in layer._parameters]
    if type(layer) is not kind or computed or getattr(layer, "groups", 1) != 1:
        raise SurgeryError(
            f"the layer {layer}" + (f" whose {computed[0]} is no parameter" if computed else ""),
            expected=f"a plain torch.nn.{kind.__name__}" + (" with groups=1" if hasattr(layer, "groups") else ""),
            fix="remove parametrizations and pruning first, and leave other kinds of layers dense",
        )
