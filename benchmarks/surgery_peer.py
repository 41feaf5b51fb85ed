"""Torch-Pruning on the networks of surgery.py: half of the channels by local ℓ1, the classifier ignored.

Two attempts: ``generic``, its README's usage for any network, and where its examples have help for such a network,
``own_help`` with that help (torchvision's ViT, and attention of timm with fused qkv; examples/torchvision_models,
examples/timm_models and examples/transformers of Torch-Pruning 1.6).

Timed is what it does to a network: building the dependency graph and pruning, the median of three runs. Its result is
compared with the dense network in which the very channels that it removed are masked, ``silent`` and ``live`` as in
surgery_part.py.
"""

from __future__ import annotations

import copy
import gc
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deploy_sparse.errors import MissingDependencyError
from deploy_sparse.surgery.cost import cost_of

sys.path.append(str(Path(__file__).parent))  # found also where this file is loaded by its path
from surgery_subject import RUNS, Inputs, Subject, build, limited, on_one_line, warm_up_network

RATIO, CLASSES = 0.5, 1000
EQUAL = 1e-10  # largest accepted max|Δ| / max|y| in float64, as for our own results

Removed = Mapping[tuple[str, int], torch.Tensor]
"""Positions in the dense network that went, by module name (dimension -1: its outputs) or parameter name and axis."""


@dataclass(frozen=True)
class Help:
    """What Torch-Pruning's examples tell the pruner about a network, and what they mend after pruning."""

    arguments: Mapping[str, Any]
    mend: Callable[[nn.Module], None]


@dataclass
class Pruned:
    """A pruned network, its CPU seconds, and what was removed."""

    model: nn.Module
    graph_s: float
    prune_s: float
    removed: dict[tuple[str, int], torch.Tensor] = field(repr=False)


def measure(subject: Subject, report: Callable[..., None]) -> None:
    """Both attempts; each one's failure is recorded. Raises the generic one's when none succeeded."""
    library()
    report(stage="build")
    model, inputs = build(subject)
    attempts = {"generic": False, **({"own_help": True} if help_for(model) is not None else {})}
    del model, inputs
    small, small_inputs = warm_up_network()
    prune(small, small_inputs, None, classes=10)
    problems = []
    for attempt, helped in attempts.items():
        report(stage=attempt)
        try:
            found = tried(subject, helped=helped)
        except Exception as problem:  # it may raise anything; that is the finding
            problems.append(problem.with_traceback(None))  # whose frames hold what the attempt allocated
            what = {"error": type(problem).__name__, "reason": on_one_line(str(problem)) or type(problem).__name__}
            report(**{attempt: {"outcome": "failed", **what}})
        else:
            report(**{attempt: {"outcome": "ok", **found}})
            problems.clear()
        gc.collect()
    if problems:
        raise problems[0]


def tried(subject: Subject, *, helped: bool) -> dict[str, Any]:
    """Prune the network, check that it runs, and compare it with the masked network."""
    dense, inputs = build(subject, exportable=helped)  # its timm examples switch fused attention off too
    seconds, pruned = [], None
    for _ in range(RUNS):
        pruned = None  # whose memory is free again
        model = copy.deepcopy(dense)
        aid = help_for(model) if helped else None
        with limited():
            pruned = prune(model, inputs, aid)
        seconds.append((round(pruned.graph_s + pruned.prune_s, 4), round(pruned.graph_s, 4), round(pruned.prune_s, 4)))
        del model, aid
    assert pruned is not None
    total, graph_s, prune_s = sorted(seconds)[RUNS // 2]
    before, shapes = cost_of(dense.requires_grad_(False), inputs)
    after, new_shapes = cost_of(pruned.model.requires_grad_(False), inputs)
    if new_shapes != shapes:
        raise RuntimeError(f"outputs of shape {list(new_shapes[0])} instead of {list(shapes[0])}")
    if not pruned.removed:
        raise RuntimeError("nothing was pruned")
    try:
        relative = deviations(dense, pruned, inputs)
    except (RuntimeError, IndexError) as problem:  # it went through, whatever keeps the comparison from being made
        relative, note = {}, on_one_line(str(problem))
    else:
        note = ""
    return {
        "cpu_s": total,
        "cpu_runs": [run[0] for run in seconds],
        "graph_cpu_s": graph_s,
        "prune_cpu_s": prune_s,
        "macs": [before.macs, after.macs],
        "parameters": [before.parameters, after.parameters],
        "float64": relative,
        "equal": {kind: value <= EQUAL for kind, value in relative.items()},
        "not_compared": note,
    }


def library() -> Any:
    """Torch-Pruning.

    Raises:
        MissingDependencyError: not installed.
    """
    try:
        import torch_pruning
    except ImportError as problem:
        raise MissingDependencyError(
            f"torch-pruning is not installed ({problem})",
            expected="torch-pruning, or the board without it",
            fix="pip install torch-pruning, or leave the part 'peer' out",
        ) from problem
    return torch_pruning


def help_for(model: nn.Module) -> Help | None:
    """Its examples' help for such a network, None where they have none."""
    from torchvision.models import VisionTransformer

    if isinstance(model, VisionTransformer):

        def set_width(pruned: nn.Module) -> None:
            pruned.hidden_dim = pruned.conv_proj.out_channels

        return Help({"round_to": model.encoder.layers[0].num_heads}, set_width)
    heads = {part.qkv: part.num_heads for part in model.modules() if hasattr(part, "num_heads") and _fused(part)}
    if not heads:
        return None

    def set_heads(pruned: nn.Module) -> None:
        for part in pruned.modules():
            if hasattr(part, "num_heads") and _fused(part):
                part.num_heads = heads[part.qkv]
                width = part.qkv.weight.shape[0] // 3
                part.head_dim = width // part.num_heads
                if hasattr(part, "attn_dim"):  # what their own forward() writes as reshape(B, N, -1)
                    part.attn_dim = width

    return Help({"num_heads": heads}, set_heads)


def _fused(part: nn.Module) -> bool:
    return isinstance(getattr(part, "qkv", None), nn.Linear | nn.Conv2d)


def prune(model: nn.Module, inputs: Inputs, aid: Help | None, *, classes: int = CLASSES) -> Pruned:
    """Prune ``model`` in place as the README does. Recording what goes is not in the seconds."""
    tp = library()
    arguments: dict[str, Any] = {"num_heads": {}, **(dict(aid.arguments) if aid is not None else {})}
    names = {part: name for name, part in model.named_modules()}
    removed: dict[tuple[str, int], torch.Tensor] = {}
    rest: dict[tuple[str, int], torch.Tensor] = {}  # positions that are still there
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            model,
            inputs[0][:1],
            importance=tp.importance.GroupMagnitudeImportance(p=1),
            global_pruning=False,
            pruning_ratio=RATIO,
            ignored_layers=classifiers(model, classes),
            in_channel_groups={},  # the library's own defaults for these are shared between pruners
            out_channel_groups={},
            **arguments,
        )
        built = time.process_time()
        spent, steps = 0.0, pruner.step(interactive=True)
        while True:
            before = time.process_time()
            group = next(steps, None)
            spent += time.process_time() - before
            if group is None:
                break
            _record(group, pruner.DG, names, removed, rest)
            before = time.process_time()
            group.prune()
            spent += time.process_time() - before
    if aid is not None:
        aid.mend(model)
    return Pruned(model, built - started, spent, removed)


def classifiers(model: nn.Module, classes: int = CLASSES) -> list[nn.Module]:
    """The layers that make the classes."""
    linear = [part for part in model.modules() if isinstance(part, nn.Linear) and part.out_features == classes]
    convs = [part for part in model.modules() if isinstance(part, nn.Conv2d) and part.out_channels == classes]
    return linear + convs


def _record(group: Any, graph: Any, names: Mapping[nn.Module, str], removed: Any, rest: Any) -> None:
    """Note what pruning this group takes out, as positions in the dense network."""
    taken: dict[tuple[str, int], tuple[int, set[int]]] = {}
    for dependency, positions in group:
        target = dependency.target
        if isinstance(target.module, nn.Parameter):
            name, axis = graph._param_to_name[target.module], target.pruning_dim
            key, size = (name, axis % target.module.dim()), target.module.shape[axis]
        elif graph.is_out_channel_pruning_fn(dependency.handler) and target.module in names:
            key, size = (names[target.module], -1), graph.get_out_channels(target.module)
        else:
            continue
        if size is not None:
            taken.setdefault(key, (size, set()))[1].update(positions)
    for key, (size, positions) in taken.items():
        own = rest.get(key, torch.arange(size))
        gone = torch.zeros(len(own), dtype=torch.bool)
        gone[[position for position in positions if position < len(own)]] = True  # it passes over others as well
        removed[key] = torch.cat((removed.get(key, own[:0]), own[gone]))
        rest[key] = own[~gone]


@torch.no_grad()
def deviations(dense: nn.Module, pruned: Pruned, inputs: Inputs) -> dict[str, float]:
    """max|Δ| / max|y| in float64 of the pruned network against the masked dense one, ``silent`` and ``live``.

    ``dense`` is changed: first the rows of removed channels go (live), then all that belongs to them (silent).
    """
    images = inputs[0].double()
    output = pruned.model.double()(images)
    dense.double()
    found = {}
    for kind in ("live", "silent"):
        mask_(dense, pruned.removed, silent=kind == "silent")
        expected = dense(images)
        found[kind] = float((output - expected).abs().max() / expected.abs().max())
    return found


@torch.no_grad()
def mask_(dense: nn.Module, removed: Removed, *, silent: bool) -> None:
    """Zero the removed channels' rows of weights; if ``silent``, their biases, norms and parameters too."""
    parts, parameters = dict(dense.named_modules()), dict(dense.named_parameters())
    for (name, axis), positions in removed.items():
        if axis >= 0:
            if silent:
                parameters[name].index_fill_(axis, positions, 0)
            continue
        part = parts[name]
        if isinstance(part, nn.MultiheadAttention):
            thrice = torch.cat([positions + i * part.embed_dim for i in range(3)])
            _zero(part.in_proj_weight, part.in_proj_bias if silent else None, thrice)
            part = part.out_proj
        own = dict(part.named_parameters(recurse=False))
        weight, bias = own.get("weight"), own.get("bias")
        if weight is not None and (silent or weight.dim() > 1):
            transposed = isinstance(part, nn.modules.conv._ConvTransposeNd)
            weight.index_fill_(int(transposed), positions, 0)
        if bias is not None and silent:
            bias.index_fill_(0, positions, 0)


def _zero(weight: torch.Tensor | None, bias: torch.Tensor | None, rows: torch.Tensor) -> None:
    for tensor in (weight, bias):
        if tensor is not None:
            tensor.index_fill_(0, rows, 0)
