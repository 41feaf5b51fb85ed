"""A ticket: the dense-shaped weights and the masks that a recipe found, and where they come from.

On disk a folder with ``ticket.safetensors`` (weights, and masks packed eight to a byte) and ``ticket.json``, which a
person can read. Loading needs neither the training code nor the network's class, and never unpickles.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as bytes_from_tensors

from . import artifact
from .errors import ArtifactError, TicketError, nearest
from .flags import any_along, masked
from .masked import masked_state
from .structure import Blocks, Channels, Dense, Unstructured, density, structure_of
from .ties import retied, ties, untied

REMAKE = "deploy-sparse run <recipe> --config <name>"
OWN = "user factory"
_PAYLOAD = "ticket.safetensors"


@dataclass(frozen=True)
class ModelRef:
    """Which network the weights belong to.

    Attributes:
        name: a zoo name, or ``"user factory"`` for a network the caller constructs. A file never names code to import.
        arguments: keyword arguments of the zoo's factory; JSON values only.
        input_shape: one sample without the batch axis, for example ``(3, 32, 32)``.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    input_shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Provenance:
    """Where a ticket comes from. Holds nothing that differs between two equal runs, so equal runs give equal hashes.

    Attributes:
        method: for example ``"imp_refill"``.
        config: the recipe's full configuration.
        seed: the run's seed.
        data: name and split sizes of the data.
        versions: libraries that took part.
        parent: hash of the ticket this one was made from, or None.
        metrics: numbers known when it was made, for example ``{"validation_accuracy": 0.98}``.
    """

    method: str
    config: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    parent: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Ticket:
    """Dense-shaped weights and boolean masks.

    Attributes:
        weights: the whole state dict (parameters and buffers) by name, on the CPU. Names of one tensor are tied, stay
            tied on disk and in :meth:`masked_weights`, and share one mask.
        masks: by parameter name, same shape as the parameter; True survives. Unmasked parameters survive whole. Of tied
            names one needs a mask; masks of both must be equal.
        model: the network the weights belong to.
        provenance: where they come from.
    """

    weights: Mapping[str, torch.Tensor]
    masks: Mapping[str, torch.Tensor]
    model: ModelRef
    provenance: Provenance

    def __repr__(self) -> str:
        share = f"density {density(self.masks):.1%}"
        return f"Ticket({self.model.name}, {len(self.masks)} of {len(self.weights)} tensors masked, {share})"

    @property
    def hash(self) -> str:
        """SHA-256 over weights, masks, model and provenance: equal tickets, equal hashes."""
        payload, body = self._content()
        return str(artifact.describe("ticket", payload, body)["digest"])

    @classmethod
    def from_masked_model(
        cls,
        source: torch.nn.Module | Mapping[str, torch.Tensor],
        *,
        model: ModelRef | None = None,
        method: str = "masked model",
    ) -> Ticket:
        """A ticket of a network that something else pruned: zeros in its weights, or masks beside them.

        Read are exact zeros in weights of two or more dimensions, masks of ``torch.nn.utils.prune`` (``X_orig`` with
        ``X_mask``), and ``X_mask`` beside ``X``; an entry survives when its mask keeps it and it is not zero. A weight
        of nothing but zeros gets no mask: so positions and residual branches start, unpruned. A bias entry counts where
        it is zero with its whole row, an entry of a norm where scale and shift are both zero. Masks under any name are
        read first; the ticket's names are those of the unpruned network.

        Args:
            source: the network (not changed), or its state dict.
            model: which network it is. By default the caller's own, whose factory and example inputs ``compact`` then
                wants; a zoo network or an ``input_shape`` make them unnecessary.
            method: what pruned it, for the provenance.

        Raises:
            TicketError: nothing is pruned; a mask without its weight, of another shape, with other values than 0 and 1,
                or for one name of tied weights only; a weight computed by a parametrization, weight norm or spectral
                norm; and see :meth:`validate`.
        """
        weights, masks = masked_state(source)
        origin = Provenance(
            method, versions=artifact.environment(), metrics={"density": round(density(masks), 6)} if masks else {}
        )
        return cls(weights, masks, model or ModelRef(OWN), origin).validate()

    def masked_weights(self) -> dict[str, torch.Tensor]:
        """The state dict with every masked entry set to zero; tensors without a mask are shared, not copied.

        Tied names stay tied, also where only one of them has a mask.
        """
        aliases = ties(self.weights)
        masks = {aliases.get(name, name): mask for name, mask in self.masks.items()}
        once = {
            name: masked(weight, masks[name]) if name in masks else weight
            for name, weight in untied(self.weights, aliases).items()
        }
        return {name: once[aliases.get(name, name)] for name in self.weights}

    def validate(self, like: Mapping[str, torch.Tensor] | torch.nn.Module | None = None) -> Ticket:
        """Check the ticket, and that it fits ``like`` (a module or a state dict) when given; return it unchanged.

        Raises:
            TicketError: a mask without its weight, of a wrong shape or type; a layer with no channel left; different
                masks of tied weights; a NaN or infinite weight; weights of another architecture.
        """
        for name, mask in self.masks.items():
            self._validate_mask(name, mask)
        self._validate_ties()
        for name, weight in self.weights.items():
            if weight.is_floating_point() and not _finite(weight):
                bad = int((~torch.isfinite(weight)).sum())
                raise TicketError(
                    f"weight {name!r} has {bad} entries that are NaN or infinite",
                    expected="finite weights",
                    fix="lower the learning rate and train again, or load an earlier checkpoint",
                )
        if like is not None:
            self._validate_fit(like.state_dict() if isinstance(like, torch.nn.Module) else like)
        return self

    def summary(self) -> dict[str, Any]:
        """What ``deploy-sparse show`` prints: model, method, density, and structure by layer. JSON values only."""
        layers = []
        for name, mask in self.masks.items():
            if mask.dim() < 2:
                continue
            found = _describe(mask)
            if found["structure"] == "unstructured":  # channels may be gone all the same, as Chase leaves them
                found |= {"kept": int(mask.reshape(len(mask), -1).any(dim=1).sum()), "of": len(mask)}
            layers.append({"layer": name, "shape": list(mask.shape), **found})
        return {
            "kind": "ticket",
            "hash": self.hash,
            "model": self.model.name,
            "method": self.provenance.method,
            "density": round(density(self.masks), 6),
            "metrics": dict(self.provenance.metrics),
            "layers": layers,
        }

    def save(self, folder: str | Path) -> Path:
        """Write the ticket atomically into ``folder`` and return the folder. Saving it twice is a no-op.

        Raises:
            TicketError: see :meth:`validate`; an invalid ticket is not written.
            ArtifactError: ``folder`` holds something else, or cannot be written.
        """
        self.validate()
        payload, body = self._content()
        return artifact.write_artifact(Path(folder), "ticket", payload, body).folder

    @classmethod
    def load(cls, folder: str | Path) -> Ticket:
        """Read a ticket after checking its hashes; tensors come back bit for bit, on the CPU.

        Args:
            folder: the ticket's folder, or a file in it.

        Raises:
            ArtifactError: missing, another kind of file, truncated or altered.
            TicketError: consistent on disk but not a usable ticket.
        """
        found = artifact.read_artifact(Path(folder), "ticket", remake=REMAKE)
        try:
            tensors = tensors_from_bytes((found.folder / _PAYLOAD).read_bytes())
            model, provenance = found.body["model"], found.body["provenance"]
            masks = {
                name: _unpack(tensors[f"mask/{name}"], tuple(shape)) for name, shape in found.body["masks"].items()
            }
            stored = {k.removeprefix("weight/"): v for k, v in tensors.items() if k.startswith("weight/")}
            ticket = cls(
                weights=retied(stored, found.body.get("ties", {})),
                masks=masks,
                model=ModelRef(str(model["name"]), dict(model["arguments"]), tuple(model["input_shape"])),
                provenance=Provenance(**provenance),
            )
        except (OSError, KeyError, TypeError, ValueError, AttributeError, SafetensorError) as problem:
            raise ArtifactError(
                f"{found.folder} is not a readable ticket ({problem!r})",
                expected="a ticket written by this toolkit",
                fix=f"make it again: {REMAKE}",
            ) from None
        return ticket.validate()

    def _content(self) -> tuple[dict[str, bytes], dict[str, Any]]:
        aliases = ties(self.weights)
        tensors = {f"weight/{k}": _own(v) for k, v in untied(self.weights, aliases).items()}
        tensors |= {f"mask/{k}": _pack(v) for k, v in self.masks.items()}
        body = {
            "model": {**asdict(self.model), "input_shape": list(self.model.input_shape)},
            "provenance": asdict(self.provenance),
            "density": round(density(self.masks), 6),
            "masks": {name: list(mask.shape) for name, mask in self.masks.items()},
            "layers": {name: _describe(mask) for name, mask in self.masks.items() if mask.dim() > 1},
            **({"ties": aliases} if aliases else {}),
        }
        return {_PAYLOAD: bytes_from_tensors(tensors)}, body

    def _validate_mask(self, name: str, mask: torch.Tensor) -> None:
        weight = self.weights.get(name)
        if weight is None:
            hint = nearest(name, list(self.weights))
            raise TicketError(
                f"mask {name!r} belongs to no weight of the ticket",
                expected="masks named like the parameters they mask",
                fix=f"{hint}rename or drop the mask",
            )
        if mask.dtype != torch.bool:
            raise TicketError(
                f"mask {name!r} has dtype {mask.dtype}", expected="torch.bool", fix="convert it: mask = mask != 0"
            )
        if mask.shape != weight.shape:
            raise TicketError(
                f"mask {name!r} has shape {tuple(mask.shape)}, its weight {tuple(weight.shape)}",
                expected="a mask shaped like its weight",
                fix="make the mask from this network's own weights",
            )
        if mask.dim() > 1 and not bool(any_along(mask)):
            raise TicketError(
                f"layer {name!r} has no channel left: its mask keeps nothing",
                expected="at least one surviving channel in every layer",
                fix="prune less: a higher density, fewer rounds or a lower rate",
            )

    def _validate_ties(self) -> None:
        for alias, canonical in ties(self.weights).items():
            first, second = self.masks.get(canonical), self.masks.get(alias)
            if first is not None and second is not None and not torch.equal(first, second):
                raise TicketError(
                    f"{canonical!r} and {alias!r} are one tied tensor, but their masks differ in "
                    f"{int((first != second).sum())} entries",
                    expected="one mask for both names",
                    fix="drop one of the masks, or combine them: first | second keeps what either keeps",
                )

    def _validate_fit(self, state: Mapping[str, torch.Tensor]) -> None:
        missing = [name for name in state if name not in self.weights]
        unknown = [name for name in self.weights if name not in state]
        wrong = [
            f"{name} {tuple(self.weights[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in state.items()
            if name in self.weights and self.weights[name].shape != tensor.shape
        ]
        if missing or unknown:
            self._refuse_other_names(missing, unknown, state)
        if missing or unknown or wrong:
            parts = [
                f"{label} {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
                for label, names in (("lacks", missing), ("has unknown", unknown), ("has other shapes:", wrong))
                if names
            ]
            raise TicketError(
                f"the ticket is for another architecture than the given network: it {'; '.join(parts)}",
                expected=f"the network it was made from{self._named()}",
                fix="pass the factory of that network, or find a ticket for this one",
            )

    def _named(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.model.arguments.items())
        return "" if self.model.name == OWN else f": {self.model.name}({arguments})"

    def _refuse_other_names(self, missing: Sequence[str], unknown: Sequence[str], state: Collection[str]) -> None:
        """Refuse what is the right network under other names, as wrappers and pruning give."""
        if prefix := _prefix(unknown, missing):
            raise TicketError(
                f"every name that only the ticket has begins with {prefix!r}; the network's names are the same without",
                expected="a ticket by the names of the network that the factory makes",
                fix="make it from the state dict without the prefix: "
                f"{{name.removeprefix({prefix!r}): x for name, x in state_dict.items()}}",
            )
        if prefix := _prefix(missing, unknown):
            raise TicketError(
                f"every name that only the network has begins with {prefix!r}; the ticket's names are the same without",
                expected="a factory that makes the network itself",
                fix="let it return the network without DataParallel, torch.compile or another module around it: "
                f"network.{prefix.rstrip('.')}",
            )
        pruned = [name for name in unknown if f"{name}_orig" in state and f"{name}_mask" in state]
        if pruned:
            raise TicketError(
                f"the factory makes a pruned network: it holds '{pruned[0]}_orig' and '{pruned[0]}_mask' instead of "
                f"{pruned[0]!r}",
                expected="a factory that makes the dense network",
                fix="construct it without pruning; its weights do not matter, the ticket has its own",
            )


def _prefix(longer: Sequence[str], shorter: Sequence[str]) -> str:
    """What ``longer`` names begin with and ``shorter`` ones lack, when that is all they differ in."""
    if len(longer) != len(shorter):
        return ""
    candidates = (name.removesuffix(shorter[0]) for name in longer if name.endswith(f".{shorter[0]}"))
    return next((prefix for prefix in candidates if {f"{prefix}{name}" for name in shorter} == set(longer)), "")


def _finite(weight: torch.Tensor) -> bool:
    """A finite sum has finite terms; only where it is not, every entry is looked at."""
    return bool(torch.isfinite(weight.sum(dtype=torch.float32))) or bool(torch.isfinite(weight).all())


def _describe(mask: torch.Tensor) -> dict[str, Any]:
    match structure_of(mask):
        case Dense():
            return {"structure": "dense", "density": 1.0}
        case Channels(kept):
            share = round(float(mask.float().mean()), 6)
            return {"structure": "channels", "kept": len(kept), "of": mask.shape[0], "density": share}
        case Blocks(blocks):
            share = round(float(mask.float().mean()), 6)
            sizes = {"rows": [len(b.rows) for b in blocks], "columns": [len(b.columns) for b in blocks]}
            return {"structure": "blocks", "blocks": len(blocks), "of": mask.shape[0], **sizes, "density": share}
        case Unstructured(share):
            return {"structure": "unstructured", "density": round(share, 6)}


def _pack(mask: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1)))  # [ceil(n / 8)] uint8


def _unpack(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    count = int(np.prod(shape, dtype=np.int64))
    bits = np.unpackbits(packed.numpy(), count=count)  # [n] of 0 and 1
    return torch.from_numpy(bits.astype(bool)).reshape(shape)


def _own(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` on the CPU in a storage of its own, as the file format wants it."""
    weight = weight.detach().cpu().contiguous()
    alone = weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
    return weight if alone else weight.clone()
