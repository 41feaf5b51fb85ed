"""Reproducible batches: each one a pure function of (seed, epoch, index), whatever the processes and workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import ConfigError
from .augment import NUMBERS, augmented
from .draws import Stream, uniforms
from .files import CROP_NUMBERS, ImageFiles
from .splits import Augmentation, Split

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


def train_batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    augmentation: Augmentation = Augmentation(),  # noqa: B008 - immutable
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Batches:
    """The batches of one epoch from batch ``start`` on, in an order that depends on (seed, epoch) alone.

    Args:
        batch_size: images a batch, over all processes; a remainder smaller than a batch is left out of this epoch.
        augmentation: random changes, drawn for each image by (seed, epoch, place in the order).
        start: index of the first batch wanted; the ones before it are not computed.
        rank: this process's number; it gets the ``rank``-th of ``world`` equal slices of each batch.
        world: number of processes.
        workers: processes that decode files; sets in memory need none. They change no pixel.

    Yields:
        images ``[batch_size / world, C, H, W]`` float32, normalised, and labels ``[batch_size / world]``.

    Raises:
        ConfigError: a batch that ``world`` does not divide; a crop of images in memory; from the iteration, a file
            that cannot be decoded.
    """
    if batch_size % world:
        raise ConfigError(
            f"a batch of {batch_size} images on {world} processes",
            expected=f"a multiple of {world}, so that every process has the same share",
            fix=f"for example --fit.batch_size {batch_size + world - batch_size % world}",
        )
    if augmentation.crop and not isinstance(split.images, ImageFiles):
        raise ConfigError(
            f"augmentation by crop = {augmentation.crop} of images in memory",
            expected="shift, flip or rotation; crops are for images in files",
            fix="leave crop out",
        )
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))  # [N]
    share = batch_size // world
    firsts = range(start * batch_size + rank * share, batch_count(split, batch_size) * batch_size, batch_size)
    jobs = [_Job(order[first : first + share].tolist(), first) for first in firsts]
    return _batches(split, jobs, _Draw(augmentation, seed, epoch), workers)


def eval_batches(split: Split, batch_size: int, *, rank: int = 0, world: int = 1, workers: int = 0) -> Batches:
    """This process's part of a split, in order and not augmented; all the processes' parts are the split, once.

    Args:
        batch_size: images a batch in this process; the split's last batch may be smaller.
        rank: this process's number; of the split's batches it gets number ``rank``, ``rank + world``, ….
        world: number of processes.
        workers: processes that decode files; sets in memory need none.

    Yields:
        images ``[n, C, H, W]`` float32, normalised, and labels ``[n]``, n up to ``batch_size``.

    Raises:
        ConfigError: from the iteration, a file that cannot be decoded.
    """
    firsts = range(rank * batch_size, len(split), world * batch_size)
    jobs = [_Job(range(first, min(first + batch_size, len(split))), first) for first in firsts]
    return _batches(split, jobs, None, workers)


def batch_count(split: Split, batch_size: int) -> int:
    """Batches :func:`train_batches` yields in one epoch."""
    return len(split) // batch_size


@dataclass(frozen=True)
class _Job:
    """One batch: indices into the split, and the place of the first one in the epoch's order."""

    indices: Sequence[int]
    first: int


@dataclass(frozen=True)
class _Draw:
    """Where the random changes come from."""

    augmentation: Augmentation
    seed: int
    epoch: int

    def numbers(self, job: _Job) -> torch.Tensor:
        """``[n, NUMBERS + CROP_NUMBERS]`` (the last ones only for crops) in [0, 1)."""
        places = torch.arange(job.first, job.first + len(job.indices))
        count = NUMBERS + bool(self.augmentation.crop) * CROP_NUMBERS
        return uniforms(count, Stream.AUGMENTATION, self.seed, self.epoch, places)


def _batches(split: Split, jobs: Sequence[_Job], draw: _Draw | None, workers: int) -> Batches:
    pixels = _stored(split.images, jobs, draw, workers)
    for job, images in zip(jobs, pixels, strict=True):
        yield split.normalised(images), split.labels[torch.as_tensor(job.indices)]


def _stored(
    images: torch.Tensor | ImageFiles, jobs: Sequence[_Job], draw: _Draw | None, workers: int
) -> Iterator[torch.Tensor]:
    """Each job's images, augmented, in the values they are stored in."""
    if isinstance(images, torch.Tensor) or not workers:
        yield from (_made(images, job, draw) for job in jobs)
        return
    loader = DataLoader(
        _Files(images, draw),
        sampler=jobs,  # a job is what this data set calls an index
        batch_size=None,  # one index is a whole batch
        num_workers=min(workers, len(jobs)),
        generator=torch.Generator(),  # else it would draw from the global one
    )
    for answer in loader:
        if not isinstance(answer, torch.Tensor):
            given, expected, fix = answer
            raise ConfigError(given, expected=expected, fix=fix)
        yield answer


def _made(images: torch.Tensor | ImageFiles, job: _Job, draw: _Draw | None) -> torch.Tensor:
    numbers = torch.empty(0) if draw is None else draw.numbers(job)
    if isinstance(images, torch.Tensor):
        pixels = images[torch.as_tensor(job.indices)]
    elif draw is not None and draw.augmentation.crop:
        pixels = images.read_crops(job.indices, draw.augmentation.crop, numbers[:, NUMBERS:])
    else:
        pixels = images.read(job.indices)
    return pixels if draw is None else augmented(pixels, draw.augmentation, numbers)


@dataclass(frozen=True, eq=False)
class _Files(Dataset[torch.Tensor | tuple[str, str, str]]):
    """What a worker process does. Errors go back as values: raised there, they would lose their type."""

    images: ImageFiles
    draw: _Draw | None

    def __getitem__(self, job: _Job) -> torch.Tensor | tuple[str, str, str]:
        try:
            return _made(self.images, job, self.draw)
        except ConfigError as problem:
            return problem.given, problem.expected, problem.fix
