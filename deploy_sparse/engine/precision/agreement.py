"""How far a lowered graph is from its float32 graph: both run in ONNX Runtime on the CPU, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime

from ...errors import BuildError, EngineError
from ..onnx.runtime import OrtSession
from ..watch import Stopped


def agreement(
    reference: bytes,
    candidate: bytes,
    batches: Sequence[Mapping[str, np.ndarray]],
    *,
    precision: str,
    as_written: bool = True,
    between: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Differences between two graphs with the same inputs and outputs, over all batches.

    Args:
        reference: bytes of the float32 graph.
        candidate: bytes of the lowered one.
        batches: arrays by input name.
        precision: of the lowered one, for messages.
        as_written: run it operator by operator; otherwise as an engine of ONNX Runtime does, with Q/DQ pairs fused into
            integer kernels (there are none for fp8).
        between: called before each batch; what it raises ends this.

    Returns:
        ``samples``; ``max_abs`` and ``mean_abs``, the largest and mean absolute difference, of the worst output;
        ``max_rel`` and ``mean_rel``, the same over the largest and the mean magnitude of an output, of the worst one;
        ``top1``, the share of samples whose largest score is the same one, where the first output is
        ``[samples, classes]``, else None. Entries for which float32 has no finite number are left out.
        Where ONNX Runtime cannot run a graph on the CPU only ``why_not``.

    Raises:
        BuildError: the lowered graph returns NaN or infinite numbers where float32 does not.
    """
    try:
        first, second = OrtSession(reference), _Plain(candidate) if as_written else OrtSession(candidate)
        found = _Differences()
        for batch in batches:
            between()
            found.add(first.run(batch), second.run(batch), precision)
    except (EngineError, BuildError) as problem:
        if isinstance(problem, _Overflow | Stopped):
            raise
        return {"why_not": problem.given}
    return found.result()


class _Plain:
    """A session that leaves the graph as it is: optimizers move Q/DQ pairs of fp8 to where there are no kernels."""

    def __init__(self, graph: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        try:
            self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as problem:  # ONNX Runtime's exceptions share no base class of their own
            raise _unable(problem) from problem
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name."""
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, dict(feeds)), strict=True))
        except Exception as problem:
            raise _unable(problem) from problem


def _unable(problem: Exception) -> BuildError:
    lines = str(problem).strip().splitlines()
    return BuildError(
        f"ONNX Runtime cannot run the lowered graph ({lines[0] if lines else type(problem).__name__})",
        expected="operators that ONNX Runtime's CPU provider implements",
        fix="compare it where it runs",
    )


class _Overflow(BuildError):
    """Raised for results that are no numbers, not for graphs that do not run."""


class _Differences:
    """Sums and maxima over batches."""

    def __init__(self) -> None:
        self.samples, self.hits, self.scored = 0, 0, 0
        self.largest: dict[str, float] = {}
        self.total: dict[str, float] = {}
        self.scale: dict[str, float] = {}
        self.magnitude: dict[str, float] = {}
        self.numbers: dict[str, int] = {}

    def add(self, expected: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray], precision: str) -> None:
        """Take in the outputs of one batch."""
        first = next(iter(expected.values()))
        self.samples += first.shape[0] if first.ndim else 1
        if first.ndim == 2 and first.shape[1] > 1 and first.dtype.kind == "f":
            theirs = next(iter(actual.values()))
            self.hits += int((first.argmax(axis=1) == theirs.argmax(axis=1)).sum())
            self.scored += first.shape[0]
        for name, ours in expected.items():
            theirs = np.asarray(actual[name], np.float64)
            ours = np.asarray(ours, np.float64)
            there = np.isfinite(ours)
            ours, theirs = ours[there], theirs[there]
            if not np.isfinite(theirs).all():
                raise _Overflow(
                    f"output {name!r} has NaN or infinite entries in {precision}; in fp32 it reaches "
                    f"{np.abs(ours).max():.4g}",
                    expected="numbers that fit the precision",
                    fix="build it in bf16, which has the range of fp32, or exclude the layers that overflow",
                )
            gap = np.abs(ours - theirs)
            self.largest[name] = max(self.largest.get(name, 0.0), float(gap.max(initial=0.0)))
            self.total[name] = self.total.get(name, 0.0) + float(gap.sum())
            self.scale[name] = max(self.scale.get(name, 0.0), float(np.abs(ours).max(initial=0.0)))
            self.magnitude[name] = self.magnitude.get(name, 0.0) + float(np.abs(ours).sum())
            self.numbers[name] = self.numbers.get(name, 0) + ours.size

    def result(self) -> dict[str, Any]:
        """Everything so far as JSON."""
        return {
            "samples": self.samples,
            "max_abs": max(self.largest.values(), default=0.0),
            "mean_abs": max((self.total[n] / max(self.numbers[n], 1) for n in self.total), default=0.0),
            "max_rel": max((self.largest[n] / (self.scale[n] or 1.0) for n in self.largest), default=0.0),
            "mean_rel": max((self.total[n] / (self.magnitude[n] or 1.0) for n in self.total), default=0.0),
            "top1": self.hits / self.scored if self.scored else None,
        }
