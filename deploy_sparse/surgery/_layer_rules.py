"""Rules for layers with weights: convolutions, Linear and BatchNorm.

They record which parameter axis holds which channels and evaluate constants: a row of zeros over whatever input gives
its bias; BatchNorm with scale zero gives its shift.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from ._axes import Ledger, Read, columns, layer_name
from ._values import Value, along, compressed, even, lean, varying
from .trace import arguments, operation, place

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})


def rule_for(node: Node) -> Callable[[Ledger, Node], Value] | None:
    """The rule of a layer operation, or None when this is none."""
    name, _ = operation(node)
    if name in CONVOLUTIONS:
        return convolution
    return {"linear": linear, "batch_norm": batch_norm}.get(name)


def unsupported(ledger: Ledger, node: Node) -> str | None:
    """Why the layer's rule does not apply: weights that are computed, or an input without batch axis."""
    given = arguments(node)
    for name, argument in given.items():
        if name != "input" and isinstance(argument, Node) and not ledger.is_state(argument):
            return f"computed {name} at {place(node)}"
    if operation(node)[0] in CONVOLUTIONS and len(_shape(given["input"])) != len(_shape(given["weight"])):
        return f"input without batch axis at {place(node)}"
    return None


def convolution(ledger: Ledger, node: Node) -> Value:
    """Ordinary, depthwise and grouped convolution."""
    given = arguments(node)
    value, groups = ledger.value(given["input"]), given["groups"]
    if groups == 1:
        return _mix(ledger, node, value, 1, padded=_pads(given))
    if groups == value.shape[1]:
        return _depthwise(ledger, node, value, padded=_pads(given))
    why = f"grouped convolution (groups={groups}) {place(node)}"
    ledger.pin(value, why)
    rows = _enter_rows(ledger, node)
    ledger.atoms.pin(rows, why)
    shape = node.meta["val"].shape
    unknown = torch.full((len(rows),), torch.nan, dtype=torch.float64)
    return Value(along(rows, 1, shape), along(unknown, 1, shape), ledger.name(given["weight"]))


def linear(ledger: Ledger, node: Node) -> Value:
    """``x @ W.T + b`` over the last axis."""
    return _mix(ledger, node, ledger.value(arguments(node)["input"]), -1, padded=False)


def batch_norm(ledger: Ledger, node: Node) -> Value:
    """Per-channel affine map with running or batch statistics; axis 1 holds the channels."""
    given = arguments(node)
    value = ledger.value(given["input"])
    channels = columns(ledger, value, 1, node)
    for key in ("weight", "bias", "running_mean", "running_var"):
        if given[key] is not None:
            role = "statistics" if key.startswith("running") else "norm" if value.producer else "shared"
            ledger.enter(ledger.name(given[key]), 0, channels, role, value.producer)  # type: ignore[arg-type]
    weight, bias, count = given["weight"], given["bias"], value.shape[1]
    scale = torch.ones(count, dtype=torch.float64) if weight is None else ledger.tensor(weight)
    shift = torch.zeros(count, dtype=torch.float64) if bias is None else ledger.tensor(bias)
    if given["training"] or given["running_mean"] is None:
        # Batch statistics remove any constant: what is left is the shift.
        settled = even(value.constant, [d for d in range(len(value.shape)) if d != 1])
        normalized = torch.where(settled.isnan(), torch.nan, 0.0)
    else:
        mean, var = ledger.tensor(given["running_mean"]), ledger.tensor(given["running_var"])
        centred = lean(value.constant) - along(mean, 1, value.shape)
        normalized = centred * along((var + given["eps"]).rsqrt(), 1, value.shape)
    scale, shift = along(scale, 1, value.shape), along(shift, 1, value.shape)
    constant = torch.where(scale == 0, shift, normalized * scale + shift)
    ledger.lose(value.atoms, value.constant, constant, f"would differ from place to place in {place(node)}")
    return Value(value.atoms, compressed(constant), value.producer, value.why)


def _mix(ledger: Ledger, node: Node, value: Value, dim: int, *, padded: bool) -> Value:
    """A layer whose every output channel reads every input channel along axis ``dim``."""
    given = arguments(node)
    name = ledger.name(given["weight"])
    dim = dim % len(value.shape)
    reads = columns(ledger, value, dim, node)
    ledger.enter(name, 1, reads, "consumer")
    rows = _enter_rows(ledger, node)
    weight = ledger.traced.tensors[name].cpu()
    taps = weight.reshape(*weight.shape[:2], -1)  # [rows, columns, taps]
    used = (taps != 0).any(dim=2)  # [rows, columns]
    others = [d for d in range(len(value.shape)) if d != dim]
    constant = even(value.constant, others).reshape(-1).expand(value.shape[dim])  # [columns]
    known_everywhere = _known_along(value.constant, dim)
    blocker, bias = _bias_for_folding(ledger, given)
    ledger.reads.append(
        Read(
            weight=name,
            layer=layer_name(node),
            atoms=reads,
            constant=constant,
            uneven=known_everywhere & constant.isnan(),
            ignored=~used.any(dim=0),
            padded=padded,
            bias=bias,
            no_fold=blocker,
        )
    )
    # Behind zero padding a constant input is no constant any more, unless it is zero itself.
    hidden = constant.isnan() | (constant != 0) if padded else constant.isnan()
    carried = ~hidden & (constant != 0)
    shift = taps[:, carried].to(torch.float64).sum(dim=2) @ constant[carried]  # [rows]
    shift = _plus_bias(ledger, given, shift)
    result = torch.where((used & hidden).any(dim=1), torch.nan, shift)
    ledger.written.append((rows, ~result.isnan()))
    shape = node.meta["val"].shape
    return Value(along(rows, dim, shape), compressed(along(result, dim, shape)), name)


def _depthwise(ledger: Ledger, node: Node, value: Value, *, padded: bool) -> Value:
    """One filter, or ``m`` filters, per channel: the rows are the input's own channels."""
    given = arguments(node)
    name, weight = ledger.name(given["weight"]), ledger.tensor(given["weight"])
    multiplier = weight.shape[0] // value.shape[1]
    rows = columns(ledger, value, 1, node).repeat_interleave(multiplier)  # [rows]
    ledger.enter(name, 0, rows, "shared")
    if given["bias"] is not None:
        ledger.enter(ledger.name(given["bias"]), 0, rows, "shared")
    others = [d for d in range(len(value.shape)) if d != 1]
    constant = even(value.constant, others).reshape(-1).expand(value.shape[1]).repeat_interleave(multiplier)
    filters = weight.reshape(weight.shape[0], -1)  # [rows, taps]
    hidden = constant.isnan() | (constant != 0) if padded else constant.isnan()
    shift = _plus_bias(ledger, given, filters.sum(dim=1) * torch.where(hidden, 0.0, constant))
    result = torch.where((filters != 0).any(dim=1) & hidden, torch.nan, shift)
    ledger.lose(rows, constant, result, leaks_through(layer_name(node)))
    shape = node.meta["val"].shape
    return Value(along(rows, 1, shape), compressed(along(result, 1, shape)), value.producer, value.why)


def leaks_through(layer: str) -> str:
    """The cause that a constant cannot pass a layer which pads with zeros."""
    return f"would leak through the zero padding of layer {layer!r}"


def _enter_rows(ledger: Ledger, node: Node) -> torch.Tensor:
    given = arguments(node)
    name = ledger.name(given["weight"])
    rows = ledger.rows(name, _shape(given["weight"])[0])
    if given["bias"] is not None:
        ledger.enter(ledger.name(given["bias"]), 0, rows, "bias", name)
    return rows


def _plus_bias(ledger: Ledger, given: dict[str, Any], shift: torch.Tensor) -> torch.Tensor:
    return shift if given["bias"] is None else shift + ledger.tensor(given["bias"])


def _bias_for_folding(ledger: Ledger, given: dict[str, Any]) -> tuple[str, str | None]:
    """Why constants cannot be folded into a bias, or ``""`` and the name of the bias, which may not exist yet."""
    name = ledger.name(given["weight"])
    if len(given["weight"].users) > 1:
        return f"{name!r} is used several times", None
    if given["bias"] is not None:
        bias = ledger.name(given["bias"])
        return ("", bias) if len(given["bias"].users) == 1 else (f"{bias!r} is used several times", None)
    path, _, attribute = name.rpartition(".")
    owner = ledger.module.get_submodule(path)
    if attribute == "weight" and isinstance(owner, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "", f"{path}.bias" if path else "bias"
    return f"{name!r} has no layer that could take a bias", None


def _known_along(constant: torch.Tensor, dim: int) -> torch.Tensor:
    others = [d for d in varying(constant) if d != dim]
    known = ~constant.isnan() if not others else (~constant.isnan()).all(dim=tuple(others), keepdim=True)
    for d in reversed(range(known.dim())):
        if d != dim:
            known = known.select(d, 0)
    return known  # [columns]


def _pads(given: dict[str, Any]) -> bool:
    if isinstance(given["padding"], str):
        return given["padding"] == "same" and any(k > 1 for k in _shape(given["weight"])[2:])
    return any(given["padding"])


def _shape(node: Node) -> torch.Size:
    return node.meta["val"].shape  # type: ignore[no-any-return]
