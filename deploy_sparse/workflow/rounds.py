"""The rounds of IMP and of the other mask sources (Chen et al. 2022, Algorithms 1 and 4, section 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

from ..sparsify.imp import dense_masks, prune_lowest
from ..sparsify.method import Method, StaticMasks
from ..sparsify.oneshot import source_masks
from ..sparsify.schedule import geometric
from ..structure import Masks
from ..ticket import Ticket
from ..train.tickets import DenseStage, RewindPoint
from .config import ImpConfig, rewind_epoch
from .prepare import Work

Structure = Callable[["Round"], Masks]


@dataclass(frozen=True)
class Round:
    """One finished round.

    Attributes:
        number: 1 for the first.
        masks: the round's masks.
        trained: the network trained under them; its weights are what structure is scored with.
        start: where a structural ticket of this round starts to train.
        shares: of each layer's rows, what its structure may keep; None for the masks' own density.
    """

    number: int
    masks: Masks
    trained: Ticket
    start: RewindPoint
    shares: Mapping[str, Fraction] | None = None


def train_dense(work: Work, imp: ImpConfig) -> DenseStage:
    """Train the dense network and remember the rewind point."""
    return work.trainer.dense(Method(), masks_of(work, imp), rewind_epoch=rewind_epoch(work.config.fit, imp))


def masks_of(work: Work, imp: ImpConfig) -> dict[str, torch.Tensor]:
    """All-True masks of every weight that is pruned."""
    return dense_masks(work.trainer.factory(), exclude=imp.exclude, linear=imp.linear)


def mask_rounds(
    work: Work, dense: DenseStage, imp: ImpConfig, wanted: tuple[int, ...], structure: Structure
) -> Iterator[Round]:
    """Rounds up to the last wanted one; those of a one-shot source only where wanted.

    Args:
        wanted: rounds of which structural tickets are made.
        structure: group-aware IMP applies it after every round, to the masks the round goes on to train under,
            scored with the weights that were pruned. What it rounds up or fills up does not count for the next round:
            every layer's share of rows is carried on unrounded.
    """
    point = _start(dense.rewind, imp)
    trained = dense.last
    left: Masks = dense.last.masks  # what the next round prunes from: weights that are trained
    shares = dict.fromkeys(left, Fraction(1))
    for number in range(1, max(wanted) + 1):
        if imp.source != "imp" and number not in wanted:
            continue
        if imp.source == "imp":
            masks: Masks = prune_lowest(trained.weights, left, imp.rate)
        else:
            masks = _one_shot(work, dense, imp, number)
        if imp.group_aware:
            shares = {n: s * Fraction(int(masks[n].sum()), int(left[n].sum())) for n, s in shares.items()}
            masks = structure(Round(number, masks, trained, point, shares))
        if imp.rewind == "finetune":
            point = RewindPoint(trained)
        trained = work.trainer.train(f"rounds/{number}", point, StaticMasks(masks), masks, keep="last")
        left = {name: masks[name] for name in left}
        yield Round(number, masks, trained, RewindPoint(trained) if imp.rewind == "finetune" else point)


def structural_ticket(work: Work, round: Round, masks: Masks) -> Ticket:
    """Train the round's structural ticket as stage ``tickets/<number>``; the best epoch on validation is kept."""
    return work.trainer.train(f"tickets/{round.number}", round.start, StaticMasks(masks), masks, keep="best")


def _start(rewind: RewindPoint, imp: ImpConfig) -> RewindPoint:
    return rewind if imp.retrain == "rest" else replace(rewind, epoch=0, memory={})


def _one_shot(work: Work, dense: DenseStage, imp: ImpConfig, number: int) -> dict[str, torch.Tensor]:
    """One-shot magnitude prunes the trained network, all others the initial one (section 5)."""
    weights = dense.last.weights if imp.source == "magnitude" else dense.initial.weights
    found = source_masks(
        imp.source,
        work.network(weights),
        dense.last.masks,
        geometric(imp.rate, number),
        batches=work.score_batches(imp.score_batches),
        example_inputs=(work.data.train.head(2).to(work.runtime.device),),
        seed=work.config.seed + number,
        distribution=imp.distribution,
    )
    return {name: mask.cpu() for name, mask in found.items()}
