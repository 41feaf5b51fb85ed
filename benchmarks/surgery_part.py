"""One part of surgery.py for one network, in a process of its own: ``surgery_part.py MODEL PART FILE``.

Every finding is added to FILE as a line of JSON when it is known, so that what was found before a crash is kept.

* ``silent``, ``live``: half of the channels of every removable group by one-shot ℓ1 masks. Silent: with their biases,
  norms and the columns that read them. Live: only rows of weights, so that norms and biases keep feeding constants.
  Timed is ``decide``: tracing, plan and compaction, the median of three runs; then the result is proven equal to the
  masked network.
* ``export-dense``, ``export-silent``, ``export-live``: ONNX, agreement in ONNX Runtime, compilation by TensorRT-RTX.
* ``peer``: Torch-Pruning, see surgery_peer.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from deploy_sparse.api import oneshot_ticket
from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.onnx.export import export_onnx
from deploy_sparse.errors import DeploySparseError, MissingDependencyError
from deploy_sparse.surgery.plan import Decision, SurgeryPlan, decide
from deploy_sparse.surgery.verify import verify

sys.path.append(str(Path(__file__).parent))  # found also where this file is loaded by its path
from surgery_subject import RUNS, Inputs, Subject, build, limited, on_one_line, peak_gib, subjects, warm_up_network

SPARSITY, SCORE = 0.5, "l1"
TARGET = "rtx-portable"
REASONS = 8  # of why channels stay, in a record

Report = Callable[..., None]


def surgery(subject: Subject, report: Report, *, silent: bool) -> None:
    """Compact the network, timed, and prove the result."""
    warm_up(silent=silent)
    decision, inputs = narrowed(subject, report, silent=silent, runs=RUNS)
    plan = decision.plan
    report(
        macs=[plan.cost_before.macs, plan.cost_after.macs],
        parameters=[plan.cost_before.parameters, plan.cost_after.parameters],
        groups=left(plan),
        unknown=list(plan.unknown)[:REASONS],
        stage="proof",
    )
    started = time.process_time()
    parity = verify(decision.dense, decision.compact, inputs, exact=decision.exact)
    report(
        float64=parity.float64.max_rel,
        float32=parity.float32.max_rel,
        parity=asdict(parity),
        proof_cpu_s=_since(started),
    )


def narrowed(
    subject: Subject, report: Report, *, silent: bool, exportable: bool = False, runs: int = 1
) -> tuple[Decision, Inputs]:
    """What :func:`decide` makes of the one-shot ticket, and the inputs it was traced with.

    Each run makes everything anew; counted is the median.
    """
    report(stage="build")
    model, inputs = build(subject, exportable=exportable)
    report(stage="ticket")
    started = time.process_time()
    ticket = oneshot_ticket(model, inputs, "channels", SPARSITY, SCORE, silent=silent)
    report(ticket_cpu_s=_since(started), memory_gib={"ticket": peak_gib()}, stage="surgery")
    before, seconds, decision = peak_gib(), [], None
    for _ in range(runs):
        decision = None  # whose memory is free again
        started = time.process_time()
        with limited():
            decision = decide(ticket, model, inputs, multiple=1)
        seconds.append(_since(started))
    assert decision is not None
    report(cpu_s=median(seconds), cpu_runs=seconds, memory_gib={"ticket": before, "surgery": peak_gib()})
    return decision, inputs


def warm_up(*, silent: bool) -> None:
    """Import and set up what the timed calls need."""
    model, inputs = warm_up_network()
    decide(oneshot_ticket(model, inputs, "channels", SPARSITY, SCORE, silent=silent), model, inputs, multiple=1)


def left(plan: SurgeryPlan) -> dict[str, Any]:
    """How many channel groups and channels there are, how many stay, and why emptied or untouchable ones do."""
    channels: Counter[tuple[str, str]] = Counter()
    groups: Counter[tuple[str, str]] = Counter()
    for group in plan.groups:
        for stay in group.stays:
            key = (stay.kind, general(stay.reason))
            channels[key] += len(stay.channels)
            groups[key] += 1
    stays = [
        {"kind": kind, "reason": reason, "groups": groups[kind, reason], "channels": count}
        for (kind, reason), count in channels.most_common()
    ]
    return {
        "groups": len(plan.groups),
        "narrowed": sum(len(group.kept) < group.size for group in plan.groups),
        "channels": sum(group.size for group in plan.groups),
        "kept": sum(len(group.kept) for group in plan.groups),
        "stays": stays[:REASONS],
        "reasons": len(stays),
    }


def general(reason: str) -> str:
    """A reason without the names and numbers of the layer it is about."""
    return re.sub(r"(?<![\w.])-?\d[\d.]*(e[-+]?\d+)?\b", "n", re.sub(r"'[^']*'", "…", reason))


def export(subject: Subject, report: Report, *, silent: bool | None) -> None:
    """Export the compact network (``silent`` None: the dense one), run it in ONNX Runtime, compile it for RTX."""
    model: nn.Module
    if silent is None:
        report(stage="build")
        model, inputs = build(subject, exportable=True)
    else:
        decision, inputs = narrowed(subject, report, silent=silent, exportable=True)
        model = decision.compact
        del decision
    with tempfile.TemporaryDirectory(prefix="surgery-") as scratch:
        report(stage="onnx")
        started = time.process_time()
        found = export_onnx(model, inputs, Path(scratch) / "model.onnx")
        assert found.parity is not None
        report(
            onnx={"cpu_s": _since(started), "max_rel": found.parity.max_rel, "batches": list(found.parity.batches)},
            stage="engine",
        )
        del model
        started = time.process_time()
        try:
            engine = build_engine(found, TARGET, out=Path(scratch) / "engines")
        except MissingDependencyError as problem:
            report(engine=None, engine_reason=problem.given)
        else:
            report(engine={"target": TARGET, "cpu_s": _since(started), "bytes": engine.manifest["bytes"]})


def peer(subject: Subject, report: Report) -> None:
    """Torch-Pruning on the same network."""
    from surgery_peer import measure

    measure(subject, report)


PARTS: dict[str, Callable[[Subject, Report], None]] = {
    "silent": lambda subject, report: surgery(subject, report, silent=True),
    "live": lambda subject, report: surgery(subject, report, silent=False),
    "peer": peer,
    "export-dense": lambda subject, report: export(subject, report, silent=None),
    "export-silent": lambda subject, report: export(subject, report, silent=True),
    "export-live": lambda subject, report: export(subject, report, silent=False),
}


def run(subject: Subject, part: str, report: Report) -> None:
    """Measure one part; whatever is raised is the outcome, not an error of this script."""
    try:
        PARTS[part](subject, report)
        report(outcome="ok", stage=None)
    except Exception as problem:  # networks and libraries may raise anything; the record says what
        report(outcome="failed", reason=reason_of(problem), error=type(problem).__name__)
    report(peak_gib=peak_gib())


def reason_of(problem: BaseException) -> str:
    """The problem on one line, without its advice."""
    text = problem.given if isinstance(problem, DeploySparseError) else str(problem)
    return on_one_line(text) or type(problem).__name__


def merged(lines: Iterable[str]) -> dict[str, Any]:
    """What a part found in all; later values replace earlier ones. A line cut off by a crash is left out."""
    found: dict[str, Any] = {}
    for line in lines:
        try:
            found.update(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def _since(started: float) -> float:
    return round(time.process_time() - started, 4)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=subjects(), metavar="MODEL")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    def report(**values: Any) -> None:
        with options.file.open("a") as file:
            file.write(json.dumps(values) + "\n")

    run(subjects()[options.model], options.part, report)


if __name__ == "__main__":
    main()
