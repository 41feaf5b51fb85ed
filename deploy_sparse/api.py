"""The calls pipelines make that need more than one room: tickets without training, zoo and target names for surgery."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from . import zoo
from .artifact import environment
from .config import Config
from .engine.target import load_target
from .errors import ConfigError, TicketError, nearest
from .masked import computed_weights
from .sparsify import entry_scores
from .sparsify._passes import held_batches
from .sparsify.channel_scores import OF_DATA, channel_scores
from .sparsify.coupling import narrowable
from .sparsify.distribution import Distribution, densities
from .sparsify.imp import dense_masks
from .sparsify.oneshot import SOURCES, source_masks
from .sparsify.patterns import channels, silence, silent_pools, whole
from .sparsify.regroup import RegroupRule, grouped_convolutions, regroup
from .structure import ChannelGroup, density
from .surgery.compact import Compact, Format
from .surgery.compact import compact as compact_ticket
from .surgery.compact import load_compact as load_compact_folder
from .surgery.graph import Inputs, channel_groups
from .surgery.inputs import checked_inputs
from .surgery.plan import Norms, Shortcuts, SurgeryPlan
from .surgery.program import load_program as load_program_file
from .ticket import ModelRef, Provenance, Ticket
from .ties import copied
from .tune.formats import choose_format
from .tune.layer_bench import layer_times_folder

Factory = Callable[[], torch.nn.Module]
Batch = tuple[torch.Tensor, torch.Tensor]
Pattern = Literal["channels", "unstructured", "blocks"]
_SCORES: Mapping[str, tuple[str, ...]] = {
    "channels": ("l1", "l2", "random", *OF_DATA),
    "unstructured": ("l1", *SOURCES),
    "blocks": ("l1", *SOURCES),
}


def compact(
    ticket: Ticket | str | Path,
    *,
    factory: Factory | None = None,
    example_inputs: tuple[torch.Tensor, ...] | None = None,
    format: Literal["auto", "dense", "channels", "packed"] = "channels",
    target: str | Path | Config | None = None,
    batch: int | Sequence[int] | None = None,
    norms: Norms = "exact",
    shortcuts: Shortcuts = "union",
) -> Compact:
    """Cut a ticket's dead channels out and verify that the smaller network computes the same function.

    Args:
        ticket: a ticket, or the folder of one.
        factory: constructs the dense network, without arguments; may be left out for a zoo network.
        example_inputs: what the network is traced and verified with, batch first, for example ``(x,)`` with ``x`` of
            shape ``[2, 3, 32, 32]``; seeded noise of the ticket's input shape by default.
        format: ``"channels"`` removes channels. ``"packed"`` runs layers whose masks are blocks as blocks besides.
            ``"dense"`` leaves the masked network as it is. ``"auto"`` times all of them on the target, which must run
            here, layer by layer and as a whole, and takes the fastest, the dense network unless another beats it; the
            plan's ``choice`` says what was timed. Times of layers are kept in the user's cache folder, or in the one
            that the environment variable ``DEPLOY_SPARSE_LAYER_TIMES`` names (``off``: nowhere).
        target: a target's name or file: kept widths are rounded up to the multiple that the target likes, by dead
            channels that stay.
        batch: samples of a call that ``"auto"`` times, or several: it wins at the first and loses at none. By default
            what the target is tuned for.
        norms: ``"exact"``: channels that a LayerNorm, RMSNorm or GroupNorm counts may go, and a norm that keeps
            counting them takes its place. ``"leave"``: such channels stay.
        shortcuts: ``"union"``: all layers that write into a shortcut keep the channels that any of them writes;
            ``"auto"`` tries ``"spread"`` too. ``"spread"``: a layer leaves out its rows of zeros and looks them up,
            which costs a copy of its output.

    Returns:
        the compact network (``.module``, in evaluation mode), the plan (``.plan``) and the verification (``.parity``).

    Raises:
        TicketError: the ticket does not fit the network, or no factory is known.
        SurgeryError: the network cannot be traced, or the result is not equal.
        ExportError, BuildError, EngineError, MissingDependencyError: for ``"auto"``, the dense network cannot be built
            or run.
        ConfigError: unknown format, target, norms or shortcuts; a batch without ``"auto"``, or that the target does not
            take; a target that does not run here for ``"auto"``.
    """
    _refuse_unknown("norms", norms, get_args(Norms))
    _refuse_unknown("shortcuts", shortcuts, get_args(Shortcuts))
    _refuse_unknown("format", format, ("auto", *get_args(Format)))
    if batch is not None and format != "auto":
        raise ConfigError(
            f"batch {batch} with format {format!r}",
            expected="a batch with format 'auto' only, which times at it",
            fix="leave it out: a compact network runs at any batch",
        )
    ticket = ticket if isinstance(ticket, Ticket) else Ticket.load(ticket)
    factory = factory or zoo_factory(ticket.model, "deploy_sparse.compact(ticket, factory=…) in Python")
    found: Any = load_target(target) if isinstance(target, str | Path) else target
    if format == "auto":
        if found is None:
            raise ConfigError(
                "format 'auto' without a target",
                expected="the target to time on",
                fix="name one that runs here (--target cpu), or choose the format 'channels' or 'packed'",
            )
        batches = found.batch.opt if batch is None else batch
        return choose_format(
            ticket,
            factory,
            found,
            example_inputs,
            batch=batches,
            norms=norms,
            shortcuts=shortcuts,
            cache=layer_times_folder(),
        )[0]
    multiple = 1 if found is None else found.width_multiple
    return compact_ticket(
        ticket, factory, example_inputs, format=format, multiple=multiple, norms=norms, shortcuts=shortcuts
    )


def load_compact(folder: str | Path, *, factory: Factory | None = None) -> torch.nn.Module:
    """Load a compact network without its ticket, in evaluation mode.

    Args:
        folder: what :meth:`Compact.save` wrote; read are ``plan.json`` and ``compact.safetensors``.
        factory: constructs the *dense* network; may be left out for a zoo network.

    Raises:
        ArtifactError: missing, truncated or altered.
        TicketError: no factory is known.
        SurgeryError: ``factory`` constructs another architecture.
    """
    if factory is None:
        factory = zoo_factory(SurgeryPlan.load(folder).model, "deploy_sparse.load_compact(folder, factory=…) in Python")
    return load_compact_folder(folder, factory)


def load_program(path: str | Path) -> torch.nn.Module:
    """Load a compact network without its factory, on the CPU: no model code is needed.

    It can be fine-tuned, but layers that behave otherwise in training (BatchNorm, dropout) stay as in evaluation; where
    that matters, use :func:`load_compact`.

    Args:
        path: what :meth:`Compact.save` wrote; read are ``plan.json`` and ``compact.pt2``.

    Raises:
        ArtifactError: missing, damaged, saved without ``compact.pt2``, or anything but a program of tensors and
            PyTorch's own operators.
    """
    return load_program_file(path)


def oneshot_ticket(
    model: torch.nn.Module,
    example_inputs: Inputs,
    pattern: Pattern = "channels",
    sparsity: float = 0.5,
    score: str = "l1",
    silent: bool = True,
    *,
    batches: Iterable[Batch] = (),
    distribution: Distribution | None = None,
    multiple: int = 1,
    rule: RegroupRule | None = None,
    exclude: str | Sequence[str] = (),
    seed: int = 0,
    reference: ModelRef | None = None,
) -> Ticket:
    """Prune any network at once, without training: a ticket with the network's own weights and masks for them.

    Args:
        model: any module that runs on the example inputs without control flow that depends on their values; it is not
            changed. For ``"unstructured"`` by magnitude or by lot it is not run.
        example_inputs: one tensor with a batch axis, or the tuple of positional inputs, on the model's device.
        pattern: ``"channels"``: whole output channels, chosen together by all layers that a residual sum couples, so
            that the network really gets narrower. ``"unstructured"``: single weights of the convolutions and Linear
            layers, but not of the head. ``"blocks"``: those gathered into dense blocks by regroup; the ticket's metrics
            say how many layers no block was found in (``dense_layers``) and, as for all patterns, the ``density`` of
            the masked layers.
        sparsity: what goes, in [0, 1). Channels: of every group of coupled layers that can be narrowed, that share of
            its channels, rounded so that ⌈(1 - sparsity) · c_out⌉ stay; what reads them goes besides. Otherwise: that
            share of the prunable weights. Other distributions than ``"uniform"`` spread the share of weights.
        score: what decides; the largest stay. Channels: ``"l1"``, ``"l2"`` norm of the weights, ``"random"``, or with
            ``batches`` ``"activation_l1"``, ``"activation_l2"``, ``"saliency"``. Weights: ``"l1"`` or ``"magnitude"``
            (the same for one weight), ``"random"``, ``"synflow"``, or with ``batches`` ``"snip"``, ``"grasp"``.
        silent: for channels and blocks: mask what belongs to a dropped channel too (bias, norm, the columns that read
            it), so that it is zero everywhere. False masks only rows of weights, depthwise filters among them, and
            leaves biases and norms live, so that a dropped channel holds a constant.
        batches: images and labels on the model's device, for the scores that need data.
        distribution: ``"uniform"``, ``"global"``, or ``"erk"``; uniform for channels and global for weights by default.
        multiple: round the kept channels of a group up to this multiple.
        rule: how blocks are formed; by default as many positions as the sparsity leaves, where most magnitude lies.
        exclude: shell patterns of weight names to leave dense, or one; what they are coupled with stays dense too.
        seed: for ``"random"``.
        reference: which network this is, for example ``ModelRef("resnet18", input_shape=(3, 32, 32))`` from the zoo;
            by default the caller's own, whose factory :func:`compact` then wants.

    Raises:
        ConfigError: an unknown pattern, score or distribution, a value out of range, batches that are missing or are
            none, or nothing that could be pruned.
        TicketError: a layer would lose its last weight, or weights are not finite.
        SurgeryError: the network does not take the inputs, or cannot be traced.
    """
    _refuse_unknown("pattern", pattern, tuple(_SCORES))
    _refuse_unknown(f"score for pattern {pattern!r}:", score, _SCORES[pattern])
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real) or not 0.0 <= sparsity < 1.0:
        raise ConfigError(f"sparsity {sparsity!r}", expected="a number in [0, 1)", fix="0.5 takes one half out")
    for name, idle in (("multiple", multiple != 1 and pattern != "channels"), ("rule", rule and pattern != "blocks")):
        if idle:
            raise ConfigError(
                f"{name} with pattern {pattern!r}",
                expected="multiple for channels, rule for blocks",
                fix=f"leave {name} out, or choose the other pattern",
            )
    sparsity, exclude = float(sparsity), (exclude,) if isinstance(exclude, str) else tuple(exclude)
    distribution = distribution or ("uniform" if pattern == "channels" else "global")
    _refuse_unknown("unknown distribution", distribution, ("uniform", "global", "erk"))
    inputs, held = checked_inputs(example_inputs, model), held_batches(batches)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    metrics: dict[str, float] = {}
    whys: list[str] = []
    if pattern == "channels":
        groups = channel_groups(model, inputs)
        choice = _Choice(model, weights, 1.0 - sparsity, score, distribution, held, seed)
        masks = _channel_masks(choice, groups, exclude, multiple)
        whole_channels = silence(masks, weights, groups)
        masks = whole_channels if silent else masks | _filters(model, groups, whole_channels)
    else:
        prunable = dense_masks(model, exclude=exclude)
        masks = source_masks(
            "magnitude" if score == "l1" else score,
            model,
            prunable,
            1.0 - sparsity,
            batches=held,
            example_inputs=inputs,
            seed=seed,
            distribution=distribution,
        )
        if pattern == "blocks":
            rule = rule or RegroupRule(rule="budget")
            groups = channel_groups(model, inputs) if silent else ()
            found = regroup(masks, weights, groups, rule=rule, silent=silent, dense=grouped_convolutions(model))
            masks = dict(found.masks)
            metrics["dense_layers"] = sum(layer.outcome == "dense" for layer in found.layers)
            whys = list(dict.fromkeys(layer.reason for layer in found.layers))
    if sparsity > 0 and all(bool(mask.all()) for mask in masks.values()):
        raise ConfigError(
            f"sparsity {sparsity} with pattern {pattern!r}, by which nothing goes{': ' * bool(whys)}{'; '.join(whys)}",
            expected="a network that loses at least one weight",
            fix="prune more, or let blocks be smaller: rule=RegroupRule('budget', tile=16, empty='prune')"
            if pattern == "blocks"
            else "a higher sparsity",
        )
    metrics["density"] = round(density(masks), 6)
    shape = tuple(inputs[0].shape[1:]) if len(inputs) == 1 else ()
    config = {
        "pattern": pattern,
        "sparsity": sparsity,
        "score": score,
        "silent": silent,
        "distribution": distribution,
        "multiple": multiple,
        "exclude": list(exclude),
        "rule": asdict(rule) if rule is not None else None,
    }
    return Ticket(
        weights=copied({name: tensor.cpu() for name, tensor in weights.items()}),
        masks={name: mask.cpu() for name, mask in masks.items()},
        model=reference or ModelRef("user factory", input_shape=shape),
        provenance=Provenance(
            "oneshot",
            config,
            seed,
            data={"samples": sum(len(labels) for _, labels in held)} if held else {},
            versions=environment(),
            metrics=metrics,
        ),
    ).validate(model)


def zoo_factory(model: ModelRef, call: str) -> Factory:
    """The factory of a zoo network.

    Raises:
        TicketError: ``model`` is the caller's own network; the message names ``call``, which takes its factory.
    """
    if not zoo.known(model.name):
        raise TicketError(
            f"the ticket is of {model.name!r}, which is no zoo network",
            expected=f"a factory for it, or one of {', '.join(zoo.ZOO)}, or torchvision/<name>",
            fix=f"pass the function that constructs the dense network: {call}",
        )
    return partial(zoo.build, model.name, **model.arguments)


@dataclass(frozen=True)
class _Choice:
    model: torch.nn.Module
    weights: Mapping[str, torch.Tensor]
    density: float
    score: str
    distribution: Distribution
    batches: Sequence[Batch]
    seed: int


def _channel_masks(
    choice: _Choice, groups: Sequence[ChannelGroup], exclude: Sequence[str], multiple: int
) -> dict[str, torch.Tensor]:
    """Rows of every layer that can be narrowed, chosen together where layers are coupled."""
    names = narrowable(groups, exclude)
    masks = {name: torch.ones_like(choice.weights[name], dtype=torch.bool) for name in names}
    pools = silent_pools(masks, groups, together=True)
    if not pools:
        reasons = list(dict.fromkeys(group.pinned for group in groups if group.pinned is not None))
        computed = next(computed_weights(choice.weights), None)
        if computed is not None:
            reasons.append(f"{computed[0]!r} is computed from {computed[1]!r}")
        raise ConfigError(
            f"no layer can be narrowed: {'; '.join(reasons) or 'the network has no channels'}",
            expected="layers whose channels only layers of this network read",
            fix=computed[2]
            if computed is not None
            else f"{'exclude fewer layers, or ' if exclude else ''}take pattern='unstructured'",
        )
    masks = {rows.name: masks[rows.name] for pool in pools for rows in pool}
    if choice.score == "random":
        rows = {rows.name: masks[rows.name].new_ones(len(rows.channels)) for pool in pools for rows in pool}
        scores = entry_scores.random(rows, choice.seed)
    else:
        axis = {rows.name: rows.dim for pool in pools for rows in pool}  # 1 for transposed convolutions and embeddings
        rows = {name: mask.movedim(axis[name], 0) for name, mask in masks.items()}
        weights = {name: choice.weights[name].movedim(dim, 0) for name, dim in axis.items()}
        scores = channel_scores(choice.score, rows, weights=weights, model=choice.model, batches=choice.batches)
    shares = densities({name: mask.shape for name, mask in masks.items()}, choice.density, choice.distribution)
    return channels(scores, masks, shares, pools, width=whole(multiple))


def _filters(
    model: torch.nn.Module, groups: Sequence[ChannelGroup], masks: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Of ``masks``, those of depthwise filters: weights that follow the channels of other layers."""
    shared = {part.name for group in groups for part in group.shared}
    convolutions = {
        f"{path}.weight" for path, part in model.named_modules() if isinstance(part, torch.nn.modules.conv._ConvNd)
    }
    return {name: mask for name, mask in masks.items() if name in shared & convolutions}


def _refuse_unknown(what: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ConfigError(
            f"{what} {given!r}",
            expected=f"one of {', '.join(known)}",
            fix=f"{nearest(str(given), known)}choose one of them",
        )
