"""What two networks are compared on: the examples, and other inputs of the same and of other sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import SurgeryError
from ._outputs import tensors_of
from ._sizes import Shapes, free_size, random_inputs, shapes_of_inputs, slightly_larger
from ._skeleton import with_tensors

Sample = tuple[str, tuple[Any, ...]]
Outputs = list[torch.Tensor]
MASKED, COMPACT = "the masked dense network", "the compact network"
_SEED = 20220713
_BATCHES = (1, 3)


def in_precision(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network in evaluation mode with floating tensors in ``dtype``; those that are stay shared."""
    buffers = {name for name, _ in module.named_buffers()}

    def cast(name: str, x: torch.Tensor) -> torch.Tensor:
        made = x.to(dtype) if x.is_floating_point() else x
        return made.clone() if name in buffers and made is x else made  # some networks count in them

    return with_tensors(module, cast, lambda x: x.to(dtype) if x.is_floating_point() else x.clone()).eval()


def cast_inputs(inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """The inputs with floating tensors in ``dtype``."""
    return tuple(
        pytree.tree_map(lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, inputs)
    )


def trials(
    examples: tuple[Any, ...], dense: nn.Module, dtype: torch.dtype
) -> tuple[list[tuple[Sample, Outputs]], tuple[str, ...]]:
    """Named inputs with what ``dense``, in ``dtype``, gives for them, and what could not be tried, in words."""
    first = (f"the example inputs {shapes_of(pytree.tree_leaves(examples))}", examples)
    found = [(first, run(dense, cast_inputs(examples, dtype), MASKED))]

    def take(sample: Sample) -> bool:
        if any(sample[0] == known[0] for known, _ in found):
            return True
        outputs = _tried(dense, cast_inputs(sample[1], dtype))
        if outputs is not None:
            found.append((sample, outputs))
        return outputs is not None

    if not free_size(examples):  # token ids and the like: random numbers would not be inputs of this network
        for sample in _cut_and_repeated(examples):
            take(sample)
        return found, ()
    generator = torch.Generator().manual_seed(_SEED)

    def draw(shapes: Shapes) -> Sample:
        inputs = random_inputs(examples, shapes, generator)
        return f"random inputs {shapes_of(inputs)}", inputs

    own = shapes_of_inputs(examples)
    for shapes in (own, *(tuple(torch.Size([batch, *shape[1:]]) for shape in own) for batch in _BATCHES)):
        take(draw(shapes))
    families = [[draw(shapes) for shapes in family] for family in slightly_larger(own)]
    taken = [any(take(sample) for sample in family) for family in families]
    if any(taken) or not families:
        return found, ()
    tried = " or ".join(shapes_of(inputs) for family in families[:2] for _, inputs in family)
    return found, (f"no other spatial size (the dense network does not run at {tried})",)


class Precisions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the coarsest precision of any result within the context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.coarsest = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.coarsest = max(self.coarsest, float(torch.finfo(x.dtype).eps))
        return result


@torch.no_grad()
def run(module: nn.Module, inputs: tuple[Any, ...], what: str) -> Outputs:
    """The tensors in what ``module`` returns, with ``what`` for messages.

    Raises:
        SurgeryError: it does not run, or returns no tensor.
    """
    try:
        outputs = module(*(x.clone() if isinstance(x, torch.Tensor) else x for x in inputs))
    except Exception as problem:
        # Any error of the user's own forward() means the same here: this network does not run.
        raise refusal(f"{what} does not run: {str(problem).strip() or type(problem).__name__}") from problem
    found = tensors_of(outputs)
    if not found:
        raise SurgeryError(
            f"{what} returns {type(outputs).__name__}, in which no tensor can be found",
            expected="tensors, or lists, dictionaries, dataclasses or objects that hold them",
            fix="return the tensors themselves",
        )
    return found


def shapes_of(tensors: Any) -> str:
    """The shapes, for messages."""
    return ", ".join(str(list(x.shape)) for x in tensors if isinstance(x, torch.Tensor))


def refusal(given: str) -> SurgeryError:
    """The error that no compact network is made."""
    return SurgeryError(
        given,
        expected="finite outputs within 1e-05 · max|y| in float32 and 1e-10 · max|y| in float64",
        fix="no compact network is made; keep the masked dense one",
    )


def _tried(dense: nn.Module, inputs: tuple[Any, ...]) -> Outputs | None:
    """What the dense network gives, None where it does not take this size; some have theirs written into the code."""
    try:
        return run(dense, inputs, MASKED)
    except SurgeryError:
        return None


def _cut_and_repeated(examples: tuple[Any, ...]) -> Iterator[Sample]:
    """Inputs made of the examples: one sample of the batch, one more, fewer positions and more."""
    tensors = [x for x in examples if isinstance(x, torch.Tensor) and x.dim() > 0]
    if not tensors:
        return
    batch = tensors[0].shape[0]

    def changed(what: str, axis: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Sample:
        size = tensors[0].shape[axis]
        alike = [isinstance(x, torch.Tensor) and x.dim() > axis and x.shape[axis] == size for x in examples]
        inputs = tuple(change(x) if same else x for x, same in zip(examples, alike, strict=True))
        return f"{what} {shapes_of(inputs)}", inputs

    yield changed("one of the examples", 0, lambda x: x[:1])
    if batch:
        yield changed("one more example", 0, lambda x: torch.cat([x, x[:1]]))
    if tensors[0].dim() > 1 and tensors[0].shape[1] > 1:
        yield changed("shorter examples", 1, lambda x: x[:, :-1])
        yield changed("longer examples", 1, lambda x: torch.cat([x, x[:, :2]], dim=1))
