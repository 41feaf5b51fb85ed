"""Rules for layers with weights: convolutions, Linear, BatchNorm, PReLU and embeddings.

They record which parameter axis holds which channels and evaluate constants: a row of zeros over whatever input gives
its bias; BatchNorm with scale zero gives its shift.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ._axes import Grid, Ledger, Read, columns, known_numbers, layer_name
from ._claims import slice_of
from ._nodes import Node
from ._values import Value, along, compressed, even, lean, varying
from ._weights import contribution, rows_reading, usage
from .trace import arguments, operation, place

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
HOLDS_A_BIAS = (nn.Linear, nn.modules.conv._ConvNd)


def rule_for(node: Node) -> Callable[[Ledger, Node], Value] | None:
    """The rule of a layer operation, or None when this is none."""
    name, _ = operation(node)
    if name in CONVOLUTIONS or name in TRANSPOSED:
        return convolution
    return {
        "linear": linear,
        "batch_norm": batch_norm,
        "instance_norm": instance_norm,
        "prelu": prelu,
        "embedding": embedding,
    }.get(name)


def unsupported(ledger: Ledger, node: Node) -> str | None:
    """Why the layer's rule does not apply: weights that are computed, or an input without batch axis."""
    given = arguments(node)
    for name, argument in given.items():
        if name in ("input", "self", "indices") or not isinstance(argument, Node) or ledger.is_state(argument):
            continue
        if operation(node)[0] == "linear" and (name == "bias" or slice_of(ledger, argument) is not None):
            continue
        return f"computed {name} at {place(node)}"
    if operation(node)[0] in CONVOLUTIONS | TRANSPOSED and len(_shape(given["input"])) != len(_shape(given["weight"])):
        return f"input without batch axis at {place(node)}"
    return None


def convolution(ledger: Ledger, node: Node) -> Value:
    """Ordinary, grouped, depthwise and transposed convolution."""
    given = arguments(node)
    value, groups = ledger.value(given["input"]), given["groups"]
    transposed = operation(node)[0] in TRANSPOSED
    weight = _shape(given["weight"])
    if groups > 1 and groups == value.shape[1] and (not transposed or weight[1] == 1):
        return _depthwise(ledger, node, value, bends=transposed or _pads(given))
    bends = transposed or _pads(given)
    return _mix(ledger, node, value, 1, _Layout(groups, transposed, None, bends))


def linear(ledger: Ledger, node: Node) -> Value:
    """``x @ W.T + b`` over the last axis; the weight may be some rows of a parameter, the bias computed."""
    given = arguments(node)
    value, part = ledger.value(given["input"]), None
    axes = varying(value.atoms)
    if axes and len(value.shape) - 1 not in axes:
        return _over_positions(ledger, node, value)
    if not ledger.is_state(given["weight"]):
        found = slice_of(ledger, given["weight"])
        assert found is not None
        part = (found.start, found.stop)
    return _mix(ledger, node, value, -1, _Layout(1, False, part, False))


def _over_positions(ledger: Ledger, node: Node, value: Value) -> Value:
    """A Linear layer that mixes positions, while channels lie along another axis: it does the same to each of them."""
    given = arguments(node)
    why = f"{place(node)} mixes positions"
    for parameter in (given["weight"], given["bias"]):
        if parameter is None:
            continue
        if ledger.is_state(parameter):
            ledger.reshaped_state.setdefault(ledger.name(parameter), why)
        else:
            ledger.pin(ledger.value(parameter), why)
    settled = even(value.constant, [len(value.shape) - 1])  # [..., 1]
    shape = node.meta["val"].shape
    result = torch.full((), torch.nan, dtype=torch.float64)
    if ledger.is_state(given["weight"]) and (given["bias"] is None or ledger.is_state(given["bias"])):
        shift = 0.0 if given["bias"] is None else ledger.tensor(given["bias"])
        result = lean(settled) * ledger.tensor(given["weight"]).sum(dim=1) + shift  # [..., rows]
    ledger.lose(
        value.atoms, value.constant, result.expand(shape)[..., :1], f"would differ from place to place in {place(node)}"
    )
    return Value(lean(value.atoms).expand(shape), _laid(result, shape), why=value.why)


def batch_norm(ledger: Ledger, node: Node) -> Value:
    """Per-channel affine map with running or batch statistics; axis 1 holds the channels."""
    given = arguments(node)
    batch_statistics = given["training"] or given["running_mean"] is None
    return _per_channel_norm(ledger, node, batch_statistics)


def instance_norm(ledger: Ledger, node: Node) -> Value:
    """Per-channel affine map with the statistics of each sample, or running ones."""
    return _per_channel_norm(ledger, node, bool(arguments(node)["use_input_stats"]))


def prelu(ledger: Ledger, node: Node) -> Value:
    """``max(0, x) + a · min(0, x)`` with one slope for all channels, or one for each on axis 1."""
    given = arguments(node)
    value, slope = ledger.value(given["self"]), ledger.tensor(given["weight"])
    if slope.numel() > 1:
        channels = columns(ledger, value, 1)
        ledger.enter(ledger.name(given["weight"]), 0, channels, "shared")
        slope = along(slope, 1, value.shape)
    constant = lean(value.constant)
    return Value(
        value.atoms, _laid(torch.where(constant >= 0, constant, constant * lean(slope)), value.shape), why=value.why
    )


def embedding(ledger: Ledger, node: Node) -> Value:
    """A table ``[words, channels]`` whose columns are written along the last axis."""
    given = arguments(node)
    ledger.pin(ledger.value(given["indices"]), f"channels are positions in a table at {place(node)}")
    name, table = ledger.name(given["weight"]), ledger.traced.tensors[ledger.name(given["weight"])]
    channels = ledger.rows(name, 1, table.shape[1])
    shape = node.meta["val"].shape
    low, high = (known_numbers(x) for x in (table.amin(dim=0), table.amax(dim=0)))
    constant = torch.where(low == high, low, torch.nan)
    ledger.written.append((channels, ~constant.isnan()))
    return Value(along(channels, len(shape) - 1, shape), compressed(along(constant, len(shape) - 1, shape)), name)


@dataclass(frozen=True)
class _Layout:
    """How the weight is read, see :class:`Read`."""

    groups: int
    transposed: bool
    part: tuple[int, int] | None
    bends: bool


def _mix(ledger: Ledger, node: Node, value: Value, dim: int, laid: _Layout) -> Value:
    """A layer whose output channels each read every input channel of their group along axis ``dim``."""
    given = arguments(node)
    source = given["weight"] if laid.part is None else slice_of(ledger, given["weight"]).node  # type: ignore[union-attr]
    name = ledger.name(source)
    weight = ledger.traced.tensors[name]
    weight = weight if weight.is_meta else weight.cpu()
    dim, groups = dim % len(value.shape), laid.groups
    reads = columns(ledger, value, dim)
    rows = _enter(ledger, node, name, weight, reads, laid)
    key = (name, groups, laid.transposed, laid.part)
    if key not in ledger.usage:
        ledger.usage[key] = usage(weight, *key[1:])
    known = ledger.usage[key]
    others = [d for d in range(len(value.shape)) if d != dim]
    constant = even(value.constant, others).reshape(-1).expand(value.shape[dim])  # [groups · columns]
    blocker, bias = _bias_for_folding(ledger, given, source, laid)
    ledger.reads.append(
        Read(
            weight=name,
            layer=layer_name(node),
            groups=groups,
            transposed=laid.transposed,
            part=laid.part,
            rows=rows,
            atoms=reads,
            constant=constant,
            uneven=_known_along(value.constant, dim) & constant.isnan(),
            ignored=known.ignored,
            silent_rows=known.silent_rows,
            bends=laid.bends,
            bias=bias,
            no_fold=blocker,
            alone=ledger.uses(source) == 1,
        )
    )
    # Where the layer bends constants, an input is no constant any more, unless it is zero itself.
    hidden = constant.isnan() | (constant != 0) if laid.bends else constant.isnan()
    varies = ~known.silent_rows
    if not bool(hidden.all()):
        varies = rows_reading(weight, *key[1:], hidden & ~known.ignored, known.silent_rows)
    shift = contribution(weight, *key[1:], torch.where(hidden, 0.0, constant), ~varies & ~known.silent_rows)
    result = torch.where(varies, torch.nan, shift)
    shape = node.meta["val"].shape
    plain = given["bias"] is None or ledger.is_state(given["bias"])
    scales = plain and (given["bias"] is None or ledger.uses(given["bias"]) == 1) and ledger.uses(source) == 1
    if given["bias"] is not None and plain:
        ledger.biases[name] = ledger.name(given["bias"])
        ledger.enter(ledger.name(given["bias"]), 0, rows, "bias", name)
        result = result + ledger.tensor(given["bias"])
    ledger.written.append((rows, ~result.isnan()))
    written = Value(
        along(rows, dim, shape), compressed(along(result, dim, shape)), name, scales_with=name if scales else None
    )
    return written if plain else _plus(ledger, node, written, given["bias"], dim)


def _plus(ledger: Ledger, node: Node, written: Value, bias: Node, dim: int) -> Value:
    """A bias that is computed: its channels are those of the layer's rows."""
    added = ledger.value(bias)
    shape = node.meta["val"].shape
    ledger.atoms.unify(
        along(columns(ledger, added, 0), dim, shape), written.atoms, added.why or f"computed bias at {place(node)}"
    )
    total = lean(written.constant) + lean(added.constant.reshape([-1 if d == dim else 1 for d in range(len(shape))]))
    return Value(written.atoms, _laid(total, shape), written.producer)


def _enter(
    ledger: Ledger, node: Node, name: str, weight: torch.Tensor, reads: torch.Tensor, laid: _Layout
) -> torch.Tensor:
    """Record both axes of the weight; the channels that it writes, ``[groups · rows]``."""
    groups = laid.groups
    if laid.transposed:
        ledger.enter(name, 0, reads, "consumer")
        count = weight.shape[1]
        rows = ledger.rows(name, 1, count) if groups == 1 else _grouped_rows(ledger, name, 1, groups, count)
    else:
        rows = ledger.rows(name, 0, weight.shape[0])
        if laid.part is not None:
            rows = rows[laid.part[0] : laid.part[1]]
        ledger.enter(name, 1, reads if groups == 1 else reads.reshape(groups, -1), "consumer")
    if groups > 1:
        # Groups keep equally many inputs and outputs; a group goes as a whole.
        grid = torch.cat([reads.reshape(groups, -1), rows.reshape(groups, -1)], dim=1)
        ledger.grids.append(Grid(grid))
        ledger.settings.append((ledger.count(node, "groups", name.rpartition(".")[0], groups), grid))
    return rows


def _grouped_rows(ledger: Ledger, name: str, dim: int, groups: int, count: int) -> torch.Tensor:
    known = ledger.axes.get((name, dim))
    atoms = known.atoms if known is not None else ledger.atoms.fresh(groups * count).reshape(groups, count)
    ledger.enter(name, dim, atoms, "producer", name)
    return atoms.reshape(-1)


def _depthwise(ledger: Ledger, node: Node, value: Value, *, bends: bool) -> Value:
    """One filter, or ``m`` filters, per channel: the rows are the input's own channels."""
    given = arguments(node)
    name, weight = ledger.name(given["weight"]), ledger.tensor(given["weight"])
    multiplier = weight.shape[0] // value.shape[1]
    channels = columns(ledger, value, 1)
    rows = channels.repeat_interleave(multiplier)  # [rows]
    ledger.enter(name, 0, rows, "shared")
    stated = ledger.count(node, "groups", name.rpartition(".")[0], value.shape[1])
    ledger.settings.append((stated, channels))
    if given["bias"] is not None:
        ledger.enter(ledger.name(given["bias"]), 0, rows, "shared")
    others = [d for d in range(len(value.shape)) if d != 1]
    constant = even(value.constant, others).reshape(-1).expand(value.shape[1]).repeat_interleave(multiplier)
    filters = weight.reshape(weight.shape[0], -1)  # [rows, taps]
    hidden = constant.isnan() | (constant != 0) if bends else constant.isnan()
    shift = filters.sum(dim=1) * torch.where(hidden, 0.0, constant)
    if given["bias"] is not None:
        shift = shift + ledger.tensor(given["bias"])
    result = torch.where((filters != 0).any(dim=1) & hidden, torch.nan, shift)
    ledger.lose(rows, constant, result, leaks_through(layer_name(node)))
    shape = node.meta["val"].shape
    return Value(along(rows, 1, shape), compressed(along(result, 1, shape)), value.producer, value.why)


def leaks_through(layer: str) -> str:
    """The cause that a constant cannot pass a layer which pads with zeros."""
    return f"would leak through the zero padding of layer {layer!r}"


def _per_channel_norm(ledger: Ledger, node: Node, batch_statistics: bool) -> Value:
    given = arguments(node)
    value = ledger.value(given["input"])
    channels = columns(ledger, value, 1)
    for key in ("weight", "bias", "running_mean", "running_var"):
        if given[key] is not None:
            role = "statistics" if key.startswith("running") else "norm" if value.producer else "shared"
            ledger.enter(ledger.name(given[key]), 0, channels, role, value.producer)  # type: ignore[arg-type]
    weight, bias, count = given["weight"], given["bias"], value.shape[1]
    scale = torch.ones(count, dtype=torch.float64) if weight is None else ledger.tensor(weight)
    shift = torch.zeros(count, dtype=torch.float64) if bias is None else ledger.tensor(bias)
    if batch_statistics:
        # They remove any constant: what is left is the shift.
        settled = even(value.constant, [d for d in range(len(value.shape)) if d != 1])
        normalized = torch.where(settled.isnan(), torch.nan, 0.0)
    else:
        mean, var = ledger.tensor(given["running_mean"]), ledger.tensor(given["running_var"])
        centred = lean(value.constant) - _on_axis_1(mean, value)
        normalized = centred * _on_axis_1((var + given["eps"]).rsqrt(), value)
    scale, shift = _on_axis_1(scale, value), _on_axis_1(shift, value)
    constant = torch.where(scale == 0, shift, normalized * scale + shift)
    ledger.lose(value.atoms, value.constant, constant, f"would differ from place to place in {place(node)}")
    return Value(value.atoms, _laid(constant, value.shape), value.producer, value.why)


def _on_axis_1(vector: torch.Tensor, value: Value) -> torch.Tensor:
    return vector.reshape([-1 if d == 1 else 1 for d in range(len(value.shape))])


def _laid(small: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return compressed(small.expand(shape))


def _bias_for_folding(ledger: Ledger, given: dict[str, Any], source: Node, laid: _Layout) -> tuple[str, str | None]:
    """Why constants cannot be folded into a bias, or ``""`` and the name of the bias, which may not exist yet."""
    name = ledger.name(source)
    if ledger.uses(source) > 1 or laid.part is not None:
        return f"{name!r} is used several times", None
    if given["bias"] is not None:
        if not ledger.is_state(given["bias"]):
            return f"the bias of {name!r} is computed", None
        bias = ledger.name(given["bias"])
        return ("", bias) if ledger.uses(given["bias"]) == 1 else (f"{bias!r} is used several times", None)
    path, _, attribute = name.rpartition(".")
    owner = ledger.module.get_submodule(path)
    if attribute == "weight" and isinstance(owner, HOLDS_A_BIAS):
        return "", f"{path}.bias" if path else "bias"
    return f"{name!r} has no layer that could take a bias", None


def _known_along(constant: torch.Tensor, dim: int) -> torch.Tensor:
    others = [d for d in varying(constant) if d != dim]
    small = ~lean(constant).isnan()
    known = small if not others else small.all(dim=tuple(others), keepdim=True)
    return known.reshape(-1).expand(constant.shape[dim])  # [columns]


def _pads(given: dict[str, Any]) -> bool:
    if isinstance(given["padding"], str):
        return given["padding"] == "same" and any(k > 1 for k in _shape(given["weight"])[2:])
    return any(given["padding"])


def _shape(node: Node) -> torch.Size:
    return node.meta["val"].shape  # type: ignore[no-any-return]
