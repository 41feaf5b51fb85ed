"""From a trained ticket to measured engines: surgery, ONNX, engines, interleaved timing, report.

Every recipe ends here. Each step looks for its own verified result first, so a continued run repeats nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from ..config import Config
from ..engine.build import build_engine
from ..engine.entry import Engine
from ..engine.export import export_onnx
from ..engine.onnx_file import OnnxFile, read_onnx
from ..engine.target import load_target
from ..errors import ConfigError, MissingDependencyError
from ..measure.contents import Report, final_table, untimed_table, verdicts
from ..measure.profile import Facts, profile
from ..measure.record import LatencyRecord, append_records, read_records
from ..measure.table import Table
from ..surgery.compact import compact, load_compact
from ..surgery.plan import SurgeryPlan
from ..ticket import Ticket
from .run_report import ReportText, write_report

Factory = Callable[[], torch.nn.Module]
Predict = Callable[[torch.Tensor], torch.Tensor]


class DeployConfig(Config):
    """Where the networks are deployed to and how they are timed."""

    targets: tuple[str, ...] = Field(("cpu",), min_length=1, description="targets to build for (deploy-sparse ls)")
    batches: tuple[int, ...] = Field((1, 32), min_length=1, description="batch sizes to time")
    duration_s: float = Field(1.5, gt=0, description="timed seconds for each network and batch")
    align: bool = Field(True, description="round widths up to the multiple that the first target likes")


def check(config: DeployConfig) -> None:
    """Refuse unknown targets and batches outside their range before anything is trained.

    Raises:
        ConfigError: naming the target and what it accepts.
    """
    for target in map(load_target, config.targets):
        for batch in config.batches:
            if not target.batch.min <= batch <= target.batch.max:
                raise ConfigError(
                    f"deploy.batches holds {batch}, which target {target.name!r} does not take",
                    expected=f"batches from {target.batch.min} to {target.batch.max}",
                    fix="choose other --deploy.batches, or a target file with a wider range",
                )


@dataclass(frozen=True)
class _Subject:
    """One of the two networks on its way to engines."""

    name: str
    module: torch.nn.Module
    ticket: str
    onnx: OnnxFile


def deliver(
    *,
    dense: Ticket,
    ticket: Ticket,
    factory: Factory,
    example_inputs: tuple[torch.Tensor, ...],
    evaluate: Callable[[Predict], float],
    folder: Path,
    config: DeployConfig,
    title: str,
    tables: Sequence[Table] = (),
    command: str = "",
    poll: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
) -> Mapping[str, Any]:
    """Deploy ``dense`` and ``ticket`` side by side and write everything under ``folder``.

    Args:
        factory: constructs the dense architecture.
        example_inputs: real inputs, batch of 2 or more first; what surgery is verified and ONNX is traced with.
        evaluate: the metric (0..1) of a function from an image batch ``[N, C, H, W]`` to logits ``[N, classes]``;
            called with each engine that runs here, so the reported accuracy is that of the deployed file.
        tables: extra tables for the report.
        command: shown in the report.
        poll: raises when the run was asked to stop.
        say: receives progress lines.

    Returns:
        the final table, the verdicts and the files written, as JSON values.

    Raises:
        SurgeryError, ExportError, BuildError: a step failed; what was finished stays.
    """
    targets = [load_target(name) for name in config.targets]
    plan, small = _surgery(ticket, factory, example_inputs, folder, targets[0].width_multiple if config.align else 1)
    say(f"surgery: verified equal, {plan.cost_after.macs / plan.cost_before.macs:.1%} of the MACs stay")
    poll()
    network = factory()
    network.load_state_dict(dense.masked_weights())
    subjects = [
        _subject("dense", network.eval(), dense.hash, example_inputs, folder),
        _subject("ticket", small, ticket.hash, example_inputs, folder),
    ]
    say("export: both networks agree with their ONNX graphs in ONNX Runtime")
    engines: dict[str, dict[str, Engine]] = {}
    not_built: list[tuple[str, str]] = []
    for target in targets:
        poll()
        try:
            built = {s.name: build_engine(s.onnx, target, out=folder / "engines", name=s.name) for s in subjects}
        except MissingDependencyError as problem:
            not_built.append((target.name, problem.given))
            say(f"build {target.name}: not built, {problem.given}")
            continue
        engines[target.name] = built
        say(f"build {target.name}: {', '.join(f'{n} {e.path.stat().st_size // 1024} KiB' for n, e in built.items())}")
    records = _timed(engines, subjects, evaluate, config, folder / "records.jsonl", poll, say)
    columns, rows = plan.layer_table()
    extra = [
        *tables,
        Table("Layers before and after surgery", tuple(columns), tuple(map(tuple, rows)), "; ".join(plan.notes())),
    ]
    if not_built:
        extra.append(Table("Targets not built", ("target", "why"), tuple(not_built)))
    text = ReportText(
        title=title,
        provenance=(f"Ticket {ticket.hash[:16]}", f"Compact network verified: {plan.parity}"),
        tables=tuple(extra),
        conditions=(("command", command),) if command else (),
    )
    report = write_report(folder, records, text)
    return summary_of(report, folder)


def summary_of(report: Report, folder: Path) -> dict[str, Any]:
    """The tables, the verdicts on what was timed, and the report's file, as JSON values."""
    return {
        "timed": _as_json(final_table(report)),
        "not_timed": _as_json(untimed_table(report)),
        "verdicts": [sentence.text for sentence in verdicts(report) if sentence.kind != "not timed"],
        "report": str(folder / "report.html"),
    }


def _as_json(table: Table) -> dict[str, Any]:
    return {"columns": list(table.columns), "rows": [list(row) for row in table.cells]}


def _surgery(
    ticket: Ticket, factory: Factory, example_inputs: tuple[torch.Tensor, ...], folder: Path, multiple: int
) -> tuple[SurgeryPlan, torch.nn.Module]:
    target = folder / "compact"
    if not target.exists():
        compact(ticket, factory, example_inputs, multiple=multiple).save(target)
    return SurgeryPlan.load(target), load_compact(target, factory)  # the deployed network is the one on disk


def _subject(
    name: str, module: torch.nn.Module, ticket: str, example_inputs: tuple[torch.Tensor, ...], folder: Path
) -> _Subject:
    path = folder / "onnx" / f"{name}.onnx"
    if path.with_name(path.name + ".json").exists():
        return _Subject(name, module, ticket, read_onnx(path))
    return _Subject(name, module, ticket, export_onnx(module, example_inputs, path))


def _timed(
    engines: Mapping[str, Mapping[str, Engine]],
    subjects: Sequence[_Subject],
    evaluate: Callable[[Predict], float],
    config: DeployConfig,
    path: Path,
    poll: Callable[[], None],
    say: Callable[[str], None],
) -> tuple[LatencyRecord, ...]:
    """The records of every target, from ``path`` when an earlier attempt finished them all."""
    if path.exists():
        return read_records(path)
    records: list[LatencyRecord] = []
    for target, built in engines.items():
        facts = {s.name: Facts(accuracy=_accuracy(built[s.name], evaluate), ticket=s.ticket) for s in subjects}
        made = profile(built, "dense", batches=config.batches, duration_s=config.duration_s, facts=facts, poll=poll)
        timed = sum(record.status == "timed" for record in made.records)
        say(f"profile {target}: {timed} of {len(made.records)} timed, the others compiled, not timed here")
        records += made.records
    append_records(path, records)
    return tuple(records)


def _accuracy(engine: Engine, evaluate: Callable[[Predict], float]) -> float | None:
    if engine.runnable() is not None:
        return None
    least, most = engine.batch_range
    with engine.open() as runner:
        (entry,), (result,) = runner.inputs, runner.outputs

        def predict(images: torch.Tensor) -> torch.Tensor:
            parts = []
            for part in np.array_split(images.numpy(), -(-len(images) // most)):
                if len(part) < least:
                    padded = np.concatenate([part, np.repeat(part[-1:], least - len(part), axis=0)])
                    parts.append(runner.run({entry.name: padded})[result.name][: len(part)])
                else:
                    parts.append(runner.run({entry.name: part})[result.name])
            return torch.from_numpy(np.concatenate(parts))

        return evaluate(predict)
