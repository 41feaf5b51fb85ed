"""Dynamic sparse training: the weights that may be non-zero move during one training.

Mocanu et al. 2018 (SET), Evci et al. 2020 (RigL), Liu et al. 2021 (ITOP), Yuan et al. 2021 (MEST).
The forward and backward passes are dense, so a gradient of the masked weights is there whenever it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from ..errors import ConfigError, TicketError
from ..structure import Masks
from .amenable import amenable
from .distribution import apportion, densities
from .entry_scores import random
from .exploration import Exploration
from .flops import Flops, TrainingFlops, flops
from .method import StaticMasks
from .patterns import keep_largest, unstructured

Spread = Literal["erk", "uniform"]


def initial_masks(masks: Masks, density: float, distribution: Spread, seed: int) -> dict[str, torch.Tensor]:
    """Random masks with ``density`` of all weights together, to one weight, and at least one weight a layer.

    Args:
        masks: all-True masks of the weights that take part (:func:`imp.dense_masks` with ``head=True``).
        distribution: ``"erk"`` or ``"uniform"`` (:func:`distribution.densities`).
    """
    shares = densities({name: mask.shape for name, mask in masks.items()}, density, distribution)
    return unstructured(random(masks, seed), masks, shares, spare_best=True)


class DynamicMasks(StaticMasks):
    """Masks that move: every update drops the smallest weights and grows others, which start at zero.

    The budget is the number of weights that the first masks leave; after every update there are exactly as many, and
    the surplus of a soft bound. Layer by layer each layer has its own number. A weight that is dropped and grows again
    in the same update goes on as it was; of the others the optimizer forgets what it remembered.

    Args:
        masks: the first masks, of weights only; :func:`initial_masks`.
        exploration: when and how far the masks move.
        distribution: how the budget is spread over the layers, each with its own, once channels were removed.
        seed: of random growth.
        macs: the dense network's multiply-accumulates by weight name (:func:`surgery.cost.layer_macs`), for the
            figures in FLOPs; without them there are none.
    """

    def __init__(
        self,
        masks: Masks,
        exploration: Exploration,
        *,
        distribution: Spread = "erk",
        seed: int = 0,
        macs: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__({name: mask.clone() for name, mask in masks.items()})  # they are changed in place
        self.exploration, self.distribution, self.seed, self.macs = exploration, distribution, seed, macs
        self.names = tuple(masks)
        self.budget = sum(int(mask.sum()) for mask in masks.values())
        if not self.names or self.budget < len(self.names):
            raise ConfigError(
                f"{self.budget} weights for {len(self.names)} layers",
                expected="at least one weight in every layer",
                fix="choose a higher density",
            )
        self.total = sum(mask.numel() for mask in masks.values())
        self._layers = {name: int(mask.sum()) for name, mask in masks.items()}
        self._allowed = {name: torch.ones_like(mask) for name, mask in self.masks.items()}
        self._explored = {name: mask.clone() for name, mask in self.masks.items()}
        self._weights: dict[str, nn.Parameter] = {}
        self._gradients: dict[str, torch.Tensor] = {}  # summed over the batches before an update
        self._pending = False  # an update waits for a finite gradient
        self._heard = -1  # the step of the last gradient
        self._listened = 0  # steps with a dense gradient since the FLOPs were counted
        self._spent, self._since = TrainingFlops(), 0  # and steps since then

    @torch.no_grad()
    def start_(self, model: nn.Module) -> None:
        """Move the masks to the parameters' devices and set masked weights to zero.

        Raises:
            TicketError: a mask without its parameter, or of another shape, or a second start.
        """
        if self._weights:
            raise TicketError(
                "the method was started twice",
                expected="one training with each method",
                fix="make a new one; to continue a training, start that and call restore_",
            )
        super().start_(model)
        parameters = dict(model.named_parameters())
        self._weights = {name: parameters[name] for name in self.names}
        self._allowed = {name: torch.ones_like(mask) for name, mask in self.masks.items()}
        self._explored = {name: self.masks[name].clone() for name in self.names}

    @torch.no_grad()
    def after_backward_(self, model: nn.Module, step: int) -> None:
        """Remember the dense gradient where an update is going to need it."""
        self._heard = step
        if not (self._pending or self._listens(step + 1)):
            return
        self._listened += 1
        found = {name: weight.grad for name, weight in self._weights.items() if weight.grad is not None}
        # fp16 overflows now and then, and at round numbers of steps, as updates are
        if not all(bool(torch.isfinite(gradient).all()) for gradient in found.values()):
            return
        for name, gradient in found.items():
            if name in self._gradients:
                self._gradients[name] += gradient
            else:
                self._gradients[name] = gradient.clone()

    @torch.no_grad()
    def after_step_(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Keep the masks, and move them where an update is due.

        Raises:
            TicketError: a method that was not started, or that was not shown the gradient it needs.
        """
        self._refuse_idle("after_step_")
        super().after_step_(model, optimizer, step)
        taken = step + 1
        self._since += 1
        due, prunes = self._pending or self._due(taken), self._prunes(taken)
        by_gradient = self.exploration.growth == "gradient"
        if due and by_gradient and self._heard != step:
            raise TicketError(
                f"an update is due after step {step} and its gradient was not seen",
                expected="after_backward_(model, step) between backward() and the optimizer's step, at every step",
                fix="call it",
            )
        explores = due and (not by_gradient or bool(self._gradients))
        self._pending = due and not explores
        if explores or prunes:
            self._count_flops_()
            if prunes:
                self._prune_(taken)
            if explores:
                self._explore_(taken)
            self._refresh_()
            super().after_step_(model, optimizer, step)

    def ready(self, step: int) -> bool:
        """Whether the surplus of a soft bound is gone and no update waits."""
        soft = self.exploration.soft
        return not self._pending and (soft is None or step + 1 >= soft.until)

    def figures(self) -> dict[str, float]:
        """What the masks are like now.

        ``density``; ``explored``, the share of weights that were ever unmasked (Liu et al. 2021, ITOP);
        ``sparser_channels`` and ``amenable_channels`` (:func:`amenable.amenable`); of the dense network's FLOPs
        ``theoretical_flops`` and ``supported_flops`` of one forward pass, and ``training_flops`` of all steps so far.
        """
        weights = {name: self.masks[name] for name in self.names}
        seen = amenable(weights, {name: self._allowed[name] for name in self.names})
        found = {
            "density": self._alive() / self.total,
            "explored": sum(int(mask.sum()) for mask in self._explored.values()) / self.total,
            "sparser_channels": seen.sparser / max(1, seen.channels),
            "amenable_channels": seen.amenable / max(1, seen.channels),
        }
        if self.macs is not None:
            now = self._flops()
            spent = self._spent.after(self._since, now, self._listened)
            found["theoretical_flops"] = now.theoretical_share
            found["supported_flops"] = now.supported_share
            found["training_flops"] = spent.theoretical_share
        return {name: round(value, 6) for name, value in found.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """Masks, what was explored, gradients of an update that is coming, and the FLOPs spent."""
        counters = torch.tensor([self._since, self._listened, self._pending], dtype=torch.int64)
        parts = {"mask": self.masks, "allowed": self._allowed, "explored": self._explored, "gradient": self._gradients}
        tensors = {f"{part}/{name}": tensor for part, found in parts.items() for name, tensor in found.items()}
        return {**tensors, "counters": counters, "flops": self._spent.to_tensor()}

    @torch.no_grad()
    def restore_(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take up what :meth:`state` gave.

        First :meth:`start_`, then load weights and optimizer, then this: a start zeroes what the first masks mask.

        Raises:
            TicketError: a state of another method or network, or a method that was not started.
        """
        self._refuse_idle("restore_")
        expected = {name for name in self.state() if not name.startswith("gradient/")}
        if odd := sorted(expected ^ {name for name in state if not name.startswith("gradient/")}):
            raise TicketError(
                f"the state to continue from {'lacks' if odd[0] in expected else 'holds'} {odd[0]!r}",
                expected=f"what a {type(self).__name__} of this network saved",
                fix="continue with the method the checkpoint was written by, or remove the checkpoint",
            )
        for part, own in (("mask", self.masks), ("allowed", self._allowed), ("explored", self._explored)):
            for name, tensor in own.items():
                tensor.copy_(state[f"{part}/{name}"])
        self._gradients = {
            name: state[f"gradient/{name}"].to(weight.device)
            for name, weight in self._weights.items()
            if f"gradient/{name}" in state
        }
        self._since, self._listened, pending = state["counters"].tolist()
        self._pending = bool(pending)
        self._spent = TrainingFlops.from_tensor(state["flops"])
        self._refresh_()

    def _refuse_idle(self, call: str) -> None:
        if not self._weights:
            raise TicketError(
                f"{call} of a method that was not started",
                expected="start_(model) before the first step; then, to continue, weights, optimizer and restore_",
                fix="call start_(model) first",
            )

    def _due(self, taken: int) -> bool:
        return self.exploration.due(taken)

    def _listens(self, taken: int) -> bool:
        return self.exploration.listens(taken)

    def _prunes(self, taken: int) -> bool:
        """Whether something else happens to the masks after this step, before they move; nothing in the base."""
        return False

    def _prune_(self, taken: int) -> None:
        """What else happens to the masks."""

    def _explore_(self, taken: int) -> None:
        """Drop and grow."""
        low, high = self._targets(taken)
        for pool in low:
            self._move_([pool] if pool else list(self.names), low[pool], high[pool], taken)
        self._gradients = {}

    def _move_(self, names: list[str], low: int, high: int, taken: int) -> None:
        """Of these layers together: keep the ``low`` largest weights, then grow until there are ``high``."""
        alive = {name: self.masks[name] for name in names}
        magnitudes = {name: self._weights[name].abs() for name in names}
        kept = keep_largest(magnitudes, alive, max(low, len(names)), spare_best=True)
        free = {name: self._allowed[name] & ~kept[name] for name in names}
        scores = self._growth(free, taken)
        for name in names:
            if not bool(kept[name].any()):  # all its weights went with channels
                kept |= keep_largest(scores, {name: free[name]}, 1)
                free[name] &= ~kept[name]
        wanted = high - sum(int(mask.sum()) for mask in kept.values())
        if wanted > 0:
            grown = keep_largest(scores, free, wanted)
            kept = {name: mask | grown[name] for name, mask in kept.items()}
        for name, mask in kept.items():
            self.masks[name].copy_(mask)
            self._explored[name] |= mask

    def _growth(self, free: Masks, taken: int) -> Mapping[str, torch.Tensor]:
        if self.exploration.growth == "random":
            layer = self.names.index(next(iter(free)))  # so that layers of one shape do not grow alike
            return random(free, (self.seed * 1_000_003 + taken) * 1009 + layer)
        return {name: self._gradients[name].abs() if name in self._gradients else m * 0.0 for name, m in free.items()}

    def _targets(self, taken: int) -> tuple[dict[str, int], dict[str, int]]:
        """To how many weights each pool drops and grows; one pool without a name where the scope is global."""
        soft = self.exploration.soft
        surplus = 0 if soft is None else round(soft.at(taken) * self.total)
        if self.exploration.scope == "global":
            low, high = self.exploration.bounds(taken, self.budget, self.budget + surplus)
            return {"": low}, {"": high}
        budgets, tops = self._by_layer(self.budget), self._by_layer(self.budget + surplus)
        bounds = {name: self.exploration.bounds(taken, budget, tops[name]) for name, budget in budgets.items()}
        return {name: low for name, (low, _) in bounds.items()}, {name: high for name, (_, high) in bounds.items()}

    def _by_layer(self, weights: int) -> dict[str, int]:
        """So many weights, spread as at first, or over what is left of the layers once channels were removed."""
        room = {name: int(self._allowed[name].sum()) for name in self.names}
        parts: Mapping[str, float] = self._layers
        if sum(room.values()) < self.total:
            shapes = {name: _extent(self._allowed[name]) for name in self.names}
            shares = densities(shapes, min(1.0, weights / sum(room.values())), self.distribution)
            assert isinstance(shares, dict)
            parts = {name: share * room[name] for name, share in shares.items()}
        return apportion(parts, room, weights)

    def _refresh_(self) -> None:
        for mask, factor in zip(self.masks.values(), self._factors, strict=True):
            factor.copy_(mask)

    def _alive(self) -> int:
        return sum(int(self.masks[name].sum()) for name in self.names)

    def _flops(self) -> Flops:
        assert self.macs is not None
        return flops(self.macs, self.masks, self._allowed)

    def _count_flops_(self) -> None:
        """Account for the steps since the masks moved last, before they move again."""
        if self.macs is not None:
            self._spent = self._spent.after(self._since, self._flops(), self._listened)
        self._since, self._listened = 0, 0


def _extent(allowed: torch.Tensor) -> tuple[int, ...]:
    """The shape that is left of a weight ``[c_out, c_in, ...]`` without its removed rows and columns."""
    if allowed.dim() < 2:
        return (int(allowed.sum()),)
    cells = allowed.reshape(*allowed.shape[:2], -1).any(dim=2)  # [c_out, c_in]
    return int(cells.any(dim=1).sum()), int(cells.any(dim=0).sum()), *allowed.shape[2:]
