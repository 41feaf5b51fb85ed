"""Giving a module its narrower shape: tensors lose positions, layers learn their new sizes, norms keep their counts."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from ..errors import SurgeryError
from ._skeleton import Replace, parts_of, state_of, with_tensors
from ._substitute import put
from .layers import KeptStatisticsNorm, NarrowAttention, spread
from .parts import Attribute, Blueprint, Cut, Fold, KeptNorm


def narrowed(module: nn.Module, shape: Blueprint, values: Replace | None = None) -> nn.Module:
    """A copy of ``module`` with the shape of ``shape``; no tensor of the dense size is copied.

    Args:
        module: the dense architecture; its tensors may lie on the ``meta`` device. It is not changed.
        shape: what changes.
        values: the final content of parameter or buffer ``name``, given the dense one; biases that folding creates are
            asked for with an empty tensor. By default the positions that stay are picked.

    Raises:
        SurgeryError: the blueprint is for another architecture.
    """
    cuts: dict[str, list[Cut]] = {}
    for cut in shape.cuts:
        cuts.setdefault(cut.name, []).append(cut)
    created = {fold.bias for fold in shape.folds if fold.created}
    _refuse_other(module, [c for name, own in cuts.items() if name not in created for c in own], shape.folds)

    def smaller(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return values(name, tensor) if values is not None else pick(tensor, cuts.get(name, ()))

    made = with_tensors(module, smaller)
    for fold in shape.folds:
        if fold.created:
            _create_bias_(made, fold, values)
    for path in shape.attention:
        put(made, path, NarrowAttention.of(_part(made, path, nn.MultiheadAttention)))
    for norm in shape.norms:
        put(made, norm.module, _kept_norm(made, norm, values))
    owners = {name.rpartition(".")[0] for name in cuts}
    for attribute in shape.attributes:
        _set_(made, attribute)
    for path in owners:
        _update_sizes_(made.get_submodule(path))
    for entry in shape.spreads:
        put(made, entry.module, spread(_part(made, entry.module, nn.Module), entry.places))
    return made


def pick(tensor: torch.Tensor, cuts: Collection[Cut]) -> torch.Tensor:
    """The positions of ``tensor`` that stay, in memory laid out like the dense tensor's."""
    sizes = {cut.dim: len(cut.kept) for cut in cuts}
    smaller = tensor
    if tensor.is_meta and sizes:
        smaller = tensor.new_empty([sizes.get(dim, n) for dim, n in enumerate(tensor.shape)])
    else:
        kept = {cut.dim: torch.tensor(cut.kept, dtype=torch.int64, device=tensor.device) for cut in cuts}
        if kept.keys() == {0, 1} and tensor.numel() > _LARGE:
            smaller = torch.cat(
                [tensor.index_select(0, rows).index_select(1, kept[1]) for rows in torch.split(kept[0], _ROWS)]
            )
        else:
            for dim, positions in kept.items():
                smaller = smaller.index_select(dim, positions)
    for rank, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.dim() == rank and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=layout):
            smaller = smaller.contiguous(memory_format=layout)
    return smaller


_LARGE = 1 << 22  # numbers of a tensor whose rows are picked a few at a time, which stay in the cache
_ROWS = 64


def _create_bias_(module: nn.Module, fold: Fold, values: Replace | None) -> None:
    owner, attribute = _owner(module, fold.bias)
    weight = getattr(owner, fold.weight.rpartition(".")[2])
    transposed = isinstance(owner, nn.modules.conv._ConvTransposeNd)
    rows = weight.shape[1] * owner.groups if transposed else weight.shape[0]
    bias = weight.new_zeros(rows) if values is None else values(fold.bias, weight.new_empty(0))
    setattr(owner, attribute, nn.Parameter(bias, requires_grad=weight.requires_grad))


def _kept_norm(module: nn.Module, norm: KeptNorm, values: Replace | None) -> KeptStatisticsNorm:
    part: Any = _part(module, norm.module, nn.Module)
    weight, bias = getattr(part, "weight", None), getattr(part, "bias", None)
    floats = (p for p in module.parameters() if p.is_floating_point())
    like = next((p for p in (weight, bias) if p is not None), next(floats, None))
    made = KeptStatisticsNorm(
        norm.kind,
        dim=norm.dim,
        dense=norm.dense,
        kept=norm.kept,
        groups=norm.groups,
        eps=norm.eps,
        affine=weight is not None,
        bias=bias is not None,
        device="meta" if like is None else like.device,
        dtype=None if like is None else torch.promote_types(like.dtype, torch.float32),
    )
    made.weight, made.bias = weight, bias
    if values is not None:
        for name in ("gone_mean", "gone_var"):
            made._buffers[name] = values(f"{norm.module}.{name}", getattr(made, name))
    return made.train(part.training)


def _set_(module: nn.Module, attribute: Attribute) -> None:
    owner = _part(module, attribute.module, nn.Module)
    found = getattr(owner, attribute.name, None)
    known = found if attribute.index is None or not isinstance(found, list | tuple) else found[attribute.index]
    if known != attribute.dense:
        raise _other(f"sets {attribute.module}.{attribute.name} from {attribute.dense}", f"the network has {known!r}")
    if attribute.index is None:
        setattr(owner, attribute.name, attribute.compact)
        return
    assert isinstance(found, list | tuple)
    entries = [attribute.compact if i == attribute.index else n for i, n in enumerate(found)]
    setattr(owner, attribute.name, type(found)(entries))


def _refuse_other(module: nn.Module, cuts: Iterable[Cut], folds: Iterable[Fold]) -> None:
    tensors = dict(state_of(parts_of(module)))
    for cut in cuts:
        tensor = tensors.get(cut.name)
        if tensor is None:
            owner, attribute = _owner(module, cut.name)
            tensor = getattr(owner, attribute, None)
        if not isinstance(tensor, torch.Tensor) or tensor.dim() <= cut.dim or tensor.shape[cut.dim] != cut.size:
            found = f"shape {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else "no such tensor"
            raise _other(f"cuts {cut.name!r} along axis {cut.dim} of size {cut.size}", f"the network has {found}")
    for fold in folds:
        owner, attribute = _owner(module, fold.bias)
        missing = getattr(owner, attribute, None) is None
        if missing != fold.created:
            raise _other(f"folds constants into {fold.bias!r}", "which does not fit the network")


def _part(module: nn.Module, path: str, kind: type[nn.Module]) -> Any:
    try:
        part = module.get_submodule(path)
    except AttributeError:
        raise _other(f"changes layer {path!r}", "the network has no such layer") from None
    if not isinstance(part, kind):
        raise _other(f"replaces the {kind.__name__} {path!r}", f"the network has {type(part).__name__}")
    return part


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    try:
        return module.get_submodule(path), attribute
    except AttributeError:
        raise _other(f"cuts {name!r}", f"the network has no layer {path!r}") from None


def _other(does: str, but: str) -> SurgeryError:
    return SurgeryError(
        f"the plan {does}, but {but}",
        expected="the architecture the plan was made for",
        fix="pass the factory of that network",
    )


def _update_sizes_(part: nn.Module) -> None:
    match part:
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d():
            part.in_channels, part.out_channels = part.weight.shape[0], part.weight.shape[1] * part.groups
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            part.out_channels, part.in_channels = part.weight.shape[0], part.weight.shape[1] * part.groups
        case nn.Linear():
            part.out_features, part.in_features = part.weight.shape
        case nn.modules.batchnorm._NormBase():
            tensors = (part.weight, part.running_mean)
            part.num_features = next(t.shape[0] for t in tensors if t is not None)
        case nn.GroupNorm() if part.weight is not None:
            part.num_channels = part.weight.shape[0]
        case nn.LayerNorm() | nn.RMSNorm() if part.weight is not None:
            part.normalized_shape = tuple(part.weight.shape)
        case nn.PReLU():
            part.num_parameters = part.weight.shape[0]
        case nn.Embedding():
            part.embedding_dim = part.weight.shape[1]
