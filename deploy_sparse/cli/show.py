"""Say what any artifact is, after verifying it: a run folder, ticket, compact network, engine, ONNX file or records."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .output import emit, key_values, result_text, table

EXAMPLES = """  deploy-sparse show runs/imp_refill-resnet_digits
  deploy-sparse show runs/imp_refill-resnet_digits/ticket
  deploy-sparse show runs/imp_refill-resnet_digits/records.jsonl --json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="the artifact's folder, or a file in it")


def execute(options: argparse.Namespace) -> int:
    from .. import artifact
    from ..errors import ArtifactError

    path = Path(options.path)
    readers = {"ticket": _ticket, "plan": _plan, "engine": _engine, "checkpoint": _checkpoint}
    kind = artifact.kind_of(path)
    if path.name in ("run.json", "metrics.jsonl"):
        path, kind = path.parent, None
    if path.suffix == ".jsonl":
        value, text = _records(path)
    elif path.suffix == ".onnx" and kind != "engine":
        value, text = _onnx(path)
    elif kind in readers:
        value, text = readers[kind](path)
    elif (path / "run.json").is_file():
        value, text = _run(path)
    else:
        raise ArtifactError(
            f"{path} is {'no artifact of this toolkit' if path.exists() else 'not there'}",
            expected="a run folder, a ticket, a compact network, an engine, a .onnx file or records (.jsonl)",
            fix="check the path",
        )
    emit(options, value, lambda: text)
    return 0


def _ticket(path: Path) -> tuple[dict[str, Any], str]:
    from ..structure import unused_inputs
    from ..ticket import Ticket

    ticket = Ticket.load(path)
    summary = ticket.summary()
    head = {key: summary[key] for key in ("kind", "hash", "model", "method", "density")} | summary["metrics"]
    rows = [
        (
            layer["layer"],
            "×".join(map(str, layer["shape"])),
            layer["structure"],
            _kept(layer, unused_inputs(ticket.masks[layer["layer"]])),
            f"{layer['density']:.1%}",
        )
        for layer in summary["layers"]
    ]
    return summary, f"{key_values(head)}\n\n{table(('layer', 'shape', 'structure', 'channels', 'density'), rows)}"


def _kept(layer: dict[str, Any], unused: int) -> str:
    if "blocks" in layer:
        return f"{sum(layer['rows'])} of {layer['of']} in {layer['blocks']} block{'s' * (layer['blocks'] > 1)}"
    if "kept" not in layer:
        return "-"
    kept, inputs = f"{layer['kept']} of {layer['of']}", layer["shape"][1]
    return f"{kept} rows, {inputs - unused} of {inputs} inputs" if unused else kept


def _plan(path: Path) -> tuple[dict[str, Any], str]:
    from ..surgery.plan import SurgeryPlan

    plan = SurgeryPlan.load(path)
    columns, rows = plan.layer_table()
    verdict = [] if plan.parity is None else [str(plan.parity)]
    return plan.summary(), "\n".join(["compact network", "", table(columns, rows), "", *plan.notes(), *verdict])


def _engine(path: Path) -> tuple[dict[str, Any], str]:
    from ..engine.entry import open_entry

    engine = open_entry(path)
    facts = {
        "kind": "engine",
        "target": engine.target.name,
        "runtime": " ".join(engine.manifest["runtime"].values()),
        "precision": engine.manifest["precision"]["built"],
        "inputs": ", ".join(map(str, engine.inputs)),
        "outputs": ", ".join(map(str, engine.outputs)),
        "batch": "{}..{}".format(*engine.batch_range),
        "bytes": engine.manifest["bytes"],
        "MACs": engine.manifest["macs"],
        "runs here": engine.runnable() or "yes",
        "rebuild": engine.build_command(),
    }
    return engine.manifest, key_values(facts)


def _checkpoint(path: Path) -> tuple[dict[str, Any], str]:
    from .. import artifact

    found = artifact.read_artifact(path, "checkpoint", remake="run the recipe again with --resume")
    value = {"kind": "checkpoint", "step": found.body["step"], **found.body["values"]}
    return value, key_values(value)


def _onnx(path: Path) -> tuple[dict[str, Any], str]:
    from ..engine.onnx.file import read_onnx

    file = read_onnx(path)
    value = {"kind": "onnx", "sha256": file.sha256, **file.sidecar()}
    facts = {
        "kind": "ONNX graph",
        "sha256": file.sha256,
        "opset": file.opset,
        "inputs": ", ".join(map(str, file.inputs)),
        "outputs": ", ".join(map(str, file.outputs)),
        "parameters": file.parameters,
        "MACs": file.macs,
        "parity": file.parity or "unknown: not exported by this toolkit",
    }
    return value, key_values({k: v for k, v in facts.items() if v is not None})


def _records(path: Path) -> tuple[Any, str]:
    import json

    from ..measure.compare import compare_all
    from ..measure.contents import Report, final_table
    from ..measure.record import read_records
    from ..measure.table import plain

    records = read_records(path)
    value = [json.loads(record.to_json_line()) for record in records]
    return value, plain(final_table(Report(path.stem, records, compare_all(records))))


def _run(path: Path) -> tuple[dict[str, Any], str]:
    from ..train.run import read_run

    run = read_run(path)
    result = run.get("result", {})
    facts = {key: run.get(key) for key in ("recipe", "status", "started", "updated", "command")}
    facts |= {key: value for key, value in result.items() if isinstance(value, str | int)}
    if run.get("status") == "interrupted":
        facts["why"] = run.get("why")
    return run, "\n\n".join([key_values(facts), result_text(result)]).rstrip()
