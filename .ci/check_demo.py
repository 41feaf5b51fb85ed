"""Checks what `make demo` leaves: every artifact verifies, nothing is missing, no engine has a made-up time."""

import json
import sys
from pathlib import Path

from deploy_sparse import Ticket, load_compact, load_engine
from deploy_sparse.engine.entry import open_entry
from deploy_sparse.engine.onnx.file import read_onnx
from deploy_sparse.measure.record import read_records
from deploy_sparse.surgery.plan import SurgeryPlan

folder = Path(sys.argv[1])
run = json.loads((folder / "run.json").read_text())
assert run["status"] == "finished", run["status"]
targets = run["config"]["deploy"]["targets"]

ticket = Ticket.load(folder / "ticket")
assert ticket.hash == run["result"]["ticket"]
load_compact(folder / "compact")
plan = SurgeryPlan.load(folder / "compact")
assert plan.cost_after.macs < plan.cost_before.macs

for name in ("dense", "ticket"):
    assert read_onnx(folder / "onnx" / f"{name}.onnx").parity.top1 == 1.0

engines = [open_entry(entry) for entry in sorted((folder / "engines").iterdir())]
assert sorted((e.manifest["name"], e.target.name) for e in engines) == sorted(
    (name, target) for name in ("dense", "ticket") for target in targets
)
for engine in engines:
    if engine.runnable() is None:
        with load_engine(engine.folder) as runner:
            runner.run(runner.sample_inputs(2))

records = read_records(folder / "records.jsonl")
assert {(r.subject, r.target) for r in records} == {(e.manifest["name"], e.target.name) for e in engines}
assert all((r.status == "timed") == (r.target == "cpu") or r.status == "timed" for r in records)
assert all(r.stats is not None and r.accuracy is not None for r in records if r.target == "cpu")

for report in ("report.md", "report.html"):
    text = (folder / report).read_text()
    assert "What got slower" in text, report
print(f"demo checked: {len(engines)} engines, {len(records)} records, ticket {ticket.hash[:12]}")
