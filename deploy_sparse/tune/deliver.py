"""From a trained ticket to measured engines: surgery, ONNX, engines, interleaved timing, report.

Every recipe ends here. A continued run takes up earlier results only where their hashes say that they were made from
this ticket; anything else is refused or made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from ..config import Config
from ..engine.build import build_engine, require_runtime
from ..engine.entry import Engine
from ..engine.onnx.export import export_onnx
from ..engine.onnx.file import OnnxFile
from ..engine.target import Target, load_target
from ..errors import ArtifactError, BuildError, ConfigError, MissingDependencyError
from ..measure.contents import Report, final_table, untimed_table, verdicts
from ..measure.line_plot import LinePlot
from ..measure.profile import Facts, profile
from ..measure.record import LatencyRecord, read_records, write_records
from ..measure.table import Table
from ..surgery.compact import compact, load_compact
from ..surgery.plan import SurgeryPlan
from ..ticket import Ticket
from .choice import planned_for
from .formats import choose_format, require_timing
from .layer_bench import layer_times_folder
from .run_report import ReportText, write_report

Factory = Callable[[], torch.nn.Module]
Predict = Callable[[torch.Tensor], torch.Tensor]
Poll = Callable[[], None]
Say = Callable[[str], None]

_UNTRAINED = "dense network", "not trained: it stands here for its time only, and its accuracy is not known"


class DeployConfig(Config):
    """Where the networks are deployed to and how they are timed."""

    targets: tuple[str, ...] = Field(("cpu",), min_length=1, description="targets to build for (deploy-sparse ls)")
    batches: tuple[int, ...] = Field((1, 32), min_length=1, description="batch sizes to time")
    duration_s: float = Field(1.5, gt=0, description="timed seconds for each network and batch")
    align: bool = Field(
        True, description="round widths up to the multiple that the first target likes; auto: try that too"
    )
    format: Literal["auto", "dense", "channels", "packed"] = Field(
        "channels",
        description="how the ticket is deployed; auto: what is fastest on the first target, which must run here, at "
        "the first batch, and loses at no other",
    )


def check_deploy(config: DeployConfig) -> None:
    """Refuse what cannot be delivered before anything is trained.

    Raises:
        ConfigError: an unknown target, a batch outside a target's range, something named twice, or a format to be
            chosen by timing on a target that does not run here.
        MissingDependencyError, BuildError: no target can be built here.
    """
    for key, values in (("targets", config.targets), ("batches", config.batches)):
        if len({*values}) < len(values):
            raise ConfigError(
                f"deploy.{key} = {list(values)}", expected="each one once", fix=f"drop the repetition in --deploy.{key}"
            )
    problems = []
    for target in map(load_target, config.targets):
        try:
            require_runtime(target)
        except (MissingDependencyError, BuildError) as problem:
            problems.append(problem)
        for batch in config.batches:
            if not target.batch.min <= batch <= target.batch.max:
                raise ConfigError(
                    f"deploy.batches holds {batch}, which target {target.name!r} does not take",
                    expected=f"batches from {target.batch.min} to {target.batch.max}",
                    fix="choose other --deploy.batches, or a target file with a wider range",
                )
    if len(problems) == len(config.targets):
        raise problems[0]
    if config.format == "auto":
        require_timing(load_target(config.targets[0]))


@dataclass(frozen=True)
class _Subject:
    """One of the two networks on its way to engines."""

    name: str
    ticket: str
    network: torch.nn.Module
    inputs: tuple[torch.Tensor, ...]
    onnx: OnnxFile

    def engine(self, target: Target, out: Path) -> Engine:
        """Built from the graph, or from the network where PyTorch runs it."""
        if target.from_module:
            return build_engine(self.network, target, self.inputs, out, name=self.name)
        return build_engine(self.onnx, target, out=out, name=self.name)


def deliver(
    *,
    dense: Ticket,
    ticket: Ticket | None,
    factory: Factory,
    example_inputs: tuple[torch.Tensor, ...],
    evaluate: Callable[[Predict], float],
    folder: Path,
    config: DeployConfig,
    title: str,
    tables: Sequence[Table] = (),
    plots: Sequence[LinePlot] = (),
    explain: Callable[[SurgeryPlan], Sequence[Table]] = lambda plan: (),
    dense_is_trained: bool = True,
    command: str = "",
    poll: Poll = lambda: None,
    say: Say = lambda text: None,
) -> Mapping[str, Any]:
    """Deploy ``dense`` and ``ticket`` side by side and write everything under ``folder``.

    Args:
        ticket: None to deploy the dense network alone.
        factory: constructs the dense architecture.
        example_inputs: real inputs, batch of 2 or more first; what surgery is verified and ONNX is traced with.
        evaluate: the metric (0..1) of a function from an image batch ``[N, C, H, W]`` to logits ``[N, classes]``;
            called with each engine that runs here, so the reported accuracy is that of the deployed file.
        tables: extra tables for the report.
        plots: extra plots for the report.
        explain: more tables for the report, of the ticket's surgery.
        dense_is_trained: False where ``dense`` is the baseline for time only: its accuracy is not computed and stays
            unknown, and the report's conditions say so.
        command: shown in the report.
        poll: raises when the run was asked to stop.
        say: receives progress lines.

    Returns:
        the final table, the verdicts and the files written, as JSON values.

    Raises:
        SurgeryError, ExportError, BuildError, MissingDependencyError: a step failed, or no target could be built; what
            was finished stays.
        ArtifactError: an earlier result in ``folder`` is damaged or of another ticket.
    """
    targets = [load_target(name) for name in config.targets]
    network = factory()
    network.load_state_dict(dense.masked_weights())
    networks = {"dense": (network.eval(), dense.hash)}
    provenance, extra = [f"Dense network {dense.hash[:16]}"], list(tables)
    if ticket is not None:
        plan, small = _surgery(ticket, factory, example_inputs, folder / "compact", config, targets[0], poll, say)
        networks["ticket"] = small, ticket.hash
        provenance += [f"Ticket {ticket.hash[:16]}", f"Compact network verified: {plan.parity}"]
        extra += [*explain(plan), _layers(plan)]
        say(f"surgery: verified equal, {plan.cost_after.macs / plan.cost_before.macs:.1%} of the MACs stay")
    poll()
    subjects = [
        _Subject(
            name, digest, module, example_inputs, export_onnx(module, example_inputs, folder / "onnx" / f"{name}.onnx")
        )
        for name, (module, digest) in networks.items()
    ]
    verb = "agree with their ONNX graphs" if len(networks) > 1 else "agrees with its ONNX graph"
    say(f"export: {' and '.join(networks)} {verb} in ONNX Runtime")
    engines, not_built = _engines(targets, subjects, folder / "engines", poll, say)
    judged = [subject.name for subject in subjects if dense_is_trained or subject.name != "dense"]
    records = _timed(engines, subjects, judged, evaluate, config, folder / "records.jsonl", poll, say)
    if not_built:
        extra.append(Table("Targets not built", ("target", "why"), tuple(not_built.items())))
    text = ReportText(
        title=title,
        provenance=tuple(provenance),
        tables=tuple(extra),
        conditions=(*(() if dense_is_trained else (_UNTRAINED,)), *((("command", command),) if command else ())),
        plots=tuple(plots),
    )
    return {**summary_of(write_report(folder, records, text), folder), "not_built": not_built}


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


def _layers(plan: SurgeryPlan) -> Table:
    columns, rows = plan.layer_table()
    return Table("Layers before and after surgery", tuple(columns), tuple(map(tuple, rows)), "; ".join(plan.notes()))


def _surgery(
    ticket: Ticket,
    factory: Factory,
    example_inputs: tuple[torch.Tensor, ...],
    target: Path,
    config: DeployConfig,
    first: Target,
    poll: Poll,
    say: Say,
) -> tuple[SurgeryPlan, torch.nn.Module]:
    multiple = first.width_multiple if config.align else 1
    if not target.exists():
        if config.format == "auto":
            made, choice = choose_format(
                ticket,
                factory,
                first,
                example_inputs,
                batch=config.batches,
                duration_s=config.duration_s,
                align=config.align,
                cache=layer_times_folder(),
                poll=poll,
                say=say,
            )
            say("\n".join(choice.lines()))
        else:
            made = compact(ticket, factory, example_inputs, format=config.format, multiple=multiple)
        made.save(target)
    with _removable(target):
        plan = SurgeryPlan.load(target)
        small = load_compact(target, factory)
    planned = planned_for(first, config.batches, config.align) if config.format == "auto" else ""
    _refuse_another(plan, ticket, config.format, multiple, planned, target)
    return plan, small  # the deployed network is the one on disk


def _refuse_another(plan: SurgeryPlan, ticket: Ticket, format: str, multiple: int, planned: str, folder: Path) -> None:
    """Refuse an earlier result that this run would not make."""
    found = plan.format or ("packed" if plan.shape.packs else "channels")  # plans that do not say it are older
    if plan.ticket != ticket.hash or (format in ("channels", "packed") and plan.multiple != multiple):
        given = f"was made from ticket {plan.ticket[:12]} with widths in multiples of {plan.multiple}"
        expected = f"the compact network of ticket {ticket.hash[:12]}, multiples of {multiple}"
    elif found != format:
        given, expected = f"holds a network in the format {found!r}", f"the ticket's network in the format {format!r}"
    elif plan.target != planned:
        given, expected = f"was chosen for {plan.target or 'no target'}", f"the choice for {planned}"
    else:
        return
    raise ArtifactError(
        f"{folder} {given}", expected=expected, fix=f"remove {folder} and continue the run with --resume"
    )


@contextmanager
def _removable(path: Path) -> Iterator[None]:
    """Damage met in an earlier result is answered by removing it: the next attempt makes it again."""
    try:
        yield
    except ArtifactError as problem:
        fix = f"remove {path} and continue the run with --resume"
        raise ArtifactError(problem.given, expected=problem.expected, fix=fix) from None


def _engines(
    targets: Sequence[Target], subjects: Sequence[_Subject], out: Path, poll: Poll, say: Say
) -> tuple[dict[str, dict[str, Engine]], dict[str, str]]:
    """Engines by target and subject, and the targets that could not be built with the reason.

    Raises:
        MissingDependencyError, BuildError: no target at all could be built; the first reason.
    """
    engines: dict[str, dict[str, Engine]] = {}
    problems: dict[str, MissingDependencyError | BuildError] = {}
    for target in targets:
        poll()
        try:
            built = {s.name: s.engine(target, out) for s in subjects}
        except (MissingDependencyError, BuildError) as problem:
            problems[target.name] = problem
            say(f"warning: {target.name} is not built: {problem}")
            continue
        engines[target.name] = built
        say(f"build {target.name}: {', '.join(f'{n} {e.path.stat().st_size // 1024} KiB' for n, e in built.items())}")
    if not engines:
        raise next(iter(problems.values()))
    return engines, {name: f"{problem.given}; {problem.fix}" for name, problem in problems.items()}


def _timed(
    engines: Mapping[str, Mapping[str, Engine]],
    subjects: Sequence[_Subject],
    judged: Sequence[str],
    evaluate: Callable[[Predict], float],
    config: DeployConfig,
    path: Path,
    poll: Poll,
    say: Say,
) -> tuple[LatencyRecord, ...]:
    """Every target's records: from ``path`` where they are of exactly these engines and batches, else timed now.

    Only the ``judged`` subjects have their accuracy computed.
    """
    with _removable(path):
        known = read_records(path) if path.exists() else ()
    records: list[LatencyRecord] = []
    for target, built in engines.items():
        found = [record for record in known if record.target == target]
        if {_what(record) for record in found} != _wanted(built, config.batches):
            facts = {
                s.name: Facts(
                    accuracy=_accuracy(built[s.name], evaluate) if s.name in judged else None, ticket=s.ticket
                )
                for s in subjects
            }
            made = profile(built, "dense", batches=config.batches, duration_s=config.duration_s, facts=facts, poll=poll)
            found = list(made.records)
            timed = sum(record.status == "timed" for record in found)
            say(f"profile {target}: {f'{timed} measurements' if timed else 'compiled, not timed here'}")
        records += found
    if tuple(records) != known:
        write_records(path, records)
    return tuple(records)


def _what(record: LatencyRecord) -> tuple[str, int, str | None]:
    return record.subject, record.batch, record.hashes.get("engine")


def _wanted(built: Mapping[str, Engine], batches: Sequence[int]) -> set[tuple[str, int, str | None]]:
    return {
        (name, batch, engine.manifest["digest"])
        for name, engine in built.items()
        for batch in (batches if engine.runnable() is None else batches[:1])
    }


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
