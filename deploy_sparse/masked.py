"""Masks of a network that something else pruned: zeros in plain weights, and masks kept beside the weights.

``torch.nn.utils.prune`` keeps ``X_orig`` and ``X_mask`` instead of ``X``; research code often keeps ``X`` and
``X_mask``. Both are read back to the names of the unpruned network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from .errors import TicketError, nearest
from .ties import copied, ties

State = Mapping[str, torch.Tensor]
_USUAL_NAMES = ("weight", "bias")


def masked_state(source: nn.Module | State) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights (own copies on the CPU, ties kept) and masks of a pruned network, by the names of the unpruned one.

    Which zeros and masks count: see :meth:`Ticket.from_masked_model`.

    Raises:
        TicketError: see there.
    """
    found = _state_of(source)
    _refuse_computed(found)
    given = _masks_beside(found, isinstance(source, nn.Module))
    weights = _plain_names(found, given)
    masks = {name: _checked(name, mask, weights[name]) for name, mask in given.items()}
    _refuse_half_tied(weights, masks)
    for name in _weight_names(source, weights):
        nonzero = weights[name] != 0
        if bool(nonzero.any()) and not bool(nonzero.all()):
            masks[name] = masks[name] & nonzero if name in masks else nonzero
    masks |= _silent_entries(weights, masks)
    masks = {name: mask for name, mask in masks.items() if not bool(mask.all())}
    if not masks:
        raise TicketError(
            "nothing is pruned: no weight has a mask or an exact zero",
            expected="zeros in weights of two or more dimensions, or masks named like 'conv.weight_mask'",
            fix="prune first, or load the pruned state dict into the network; oneshot_ticket(model, inputs) prunes any",
        )
    return weights, {name: masks[name] for name in weights if name in masks}


def _state_of(source: object) -> dict[str, torch.Tensor]:
    state = source.state_dict() if isinstance(source, nn.Module) else source
    if not isinstance(state, Mapping):
        raise TicketError(
            f"a {type(source).__name__} was given",
            expected="the pruned network, or its state dict",
            fix="read the file first, for example with safetensors.torch.load_file(path)",
        )
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            inner = [key for key, entry in state.items() if isinstance(entry, Mapping)]
            raise TicketError(
                f"entry {name!r} is of type {type(value).__name__}",
                expected="a state dict: names and tensors",
                fix=f"pass the state dict inside the checkpoint, perhaps source[{inner[0]!r}]" if inner else "drop it",
            )
        if value.is_meta:
            raise TicketError(
                f"{name!r} is on the meta device and holds no values",
                expected="weights with values",
                fix="load the pruned state dict first",
            )
    tied = ties(state)
    on_cpu = {name: value.detach().cpu() for name, value in state.items() if name not in tied}
    return copied({name: on_cpu[tied.get(name, name)] for name in state})


def _refuse_computed(state: State) -> None:
    """Refuse weights that are computed from others: pruning them says nothing about the weight the network uses."""
    for what, source, cure in computed_weights(state):
        raise TicketError(f"{what!r} is computed from {source!r}", expected="plain weights", fix=cure)


def computed_weights(state: State) -> Iterator[tuple[str, str, str]]:
    """Weights that parametrizations, weight norm or spectral norm compute: the name, what from, and the cure."""
    for name in state:
        path, _, leaf = name.rpartition(".")
        owner, _, rest = name.rpartition("parametrizations.")
        if "parametrizations" in name.split("."):
            what = f"{owner}{rest.split('.')[0]}"
            how = f"parametrize.remove_parametrizations(module, {rest.split('.')[0]!r})"
        elif leaf.startswith("weight") and leaf.endswith("_g") and f"{name[:-2]}_v" in state:
            what, how = name[:-2], f"remove_weight_norm(module, {leaf[:-2]!r})"
        elif leaf.endswith("_orig") and f"{name[:-5]}_u" in state and f"{name[:-5]}_mask" not in state:
            what, how = name[:-5], f"remove_spectral_norm(module, {leaf[:-5]!r})"
        else:
            continue
        module = (owner if "parametrizations." in name else path + ".").rstrip(".") or "the network"
        yield what, name, f"write its value into the layer first: torch.nn.utils.{how}, with module = {module}"


def _masks_beside(state: State, of_module: bool) -> dict[str, torch.Tensor]:
    """The masks in a state dict, by the name of what they mask. Buffers like ``attn_mask`` are none."""
    found: dict[str, torch.Tensor] = {}
    for key in state:
        if not key.endswith("_mask"):
            continue
        name = key.removesuffix("_mask")
        plain, original = name in state, f"{name}_orig" in state
        if plain and original:
            raise TicketError(
                f"{name!r} and {name + '_orig'!r} are both there, with the mask {key!r}",
                expected="the weight under one of the two names",
                fix="drop the one that the mask does not belong to",
            )
        if plain or original:
            found[name] = state[key]
        elif not of_module and name.rpartition(".")[2] in _USUAL_NAMES:
            known = [other.removesuffix("_orig") for other in state if not other.endswith("_mask")]
            raise TicketError(
                f"mask {key!r} belongs to no weight: neither {name!r} nor {name + '_orig'!r} is there",
                expected="masks named like the weights they mask",
                fix=f"{nearest(name, known)}rename or drop the mask",
            )
    return found


def _plain_names(state: State, masked: Iterable[str]) -> dict[str, torch.Tensor]:
    """The state dict without its masks, ``X_orig`` as ``X``, and each module's weight first, as layers declare it.

    ``torch.nn.utils.prune`` moves what it prunes behind the module's other parameters.
    """
    renamed = {f"{name}_orig": name for name in masked}
    dropped = {f"{name}_mask" for name in masked}
    plain = {renamed.get(key, key): value for key, value in state.items() if key not in dropped}
    by_module: dict[str, list[str]] = {}
    for name in plain:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    order = [
        name for names in by_module.values() for name in sorted(names, key=lambda n: n.rpartition(".")[2] != "weight")
    ]
    return {name: plain[name] for name in order}


def _checked(name: str, mask: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if mask.shape != weight.shape:
        raise TicketError(
            f"mask {name + '_mask'!r} has shape {tuple(mask.shape)}, its weight {tuple(weight.shape)}",
            expected="a mask shaped like its weight",
            fix="expand it: mask.expand_as(weight)",
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise TicketError(
            f"mask {name + '_mask'!r} has other values than 0 and 1",
            expected="0 where an entry is pruned, 1 where it survives",
            fix="multiply scores into the weight, or compare them with their threshold first",
        )
    return mask != 0


def _refuse_half_tied(weights: State, masks: State) -> None:
    for alias, canonical in ties(weights).items():
        if (alias in masks) != (canonical in masks):
            with_mask, without = (alias, canonical) if alias in masks else (canonical, alias)
            raise TicketError(
                f"{with_mask!r} has a mask, {without!r} has none, and both are one tied tensor: the network uses it "
                "both masked and whole",
                expected="one mask for all names of a tied tensor",
                fix=f"prune {without!r} with the same mask, or untie the two first",
            )


def _weight_names(source: nn.Module | State, weights: State) -> Iterator[str]:
    """Floating-point tensors of two or more dimensions; of a module its parameters only, not its buffers."""
    buffers: set[str] = set()
    if isinstance(source, nn.Module):
        buffers = {name for name, _ in source.named_buffers(remove_duplicate=False)}
    for name, weight in weights.items():
        if weight.dim() > 1 and weight.is_floating_point() and name not in buffers:
            yield name


def _silent_entries(weights: State, masks: State) -> dict[str, torch.Tensor]:
    """Masks for entries of one-dimensional parameters that went with their channel, besides those given.

    A bias entry goes when it is zero and its whole row is masked; scale and shift of a norm when both are zero there,
    unless they are zero everywhere, as a residual branch may start.
    """
    found: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        prefix, _, leaf = name.rpartition(".")
        bias_name = f"{prefix}.bias".lstrip(".")
        bias = weights.get(bias_name)
        if leaf != "weight" or bias is None or bias.dim() != 1 or len(bias) != len(weight):
            continue
        if weight.dim() > 1:
            if name not in masks:
                continue
            gone = (bias == 0) & ~masks[name].reshape(len(weight), -1).any(dim=1)
            names = [bias_name]
        else:
            gone = (bias == 0) & (weight == 0)
            names = [] if bool(gone.all()) else [name, bias_name]
        for each in names:
            found[each] = masks.get(each, torch.ones_like(gone)) & ~gone
    return found
