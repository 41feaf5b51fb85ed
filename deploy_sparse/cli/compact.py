"""Cut a ticket into a smaller network, verify that it computes the same function, and save it.

`deploy-sparse inspect` shows beforehand what will be cut.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .output import emit
from .plan_text import plan_text

EXAMPLES = """  deploy-sparse compact runs/imp_refill-resnet_digits/ticket --out compact
  deploy-sparse compact my_ticket --target rtx-sm89 --out compact
  deploy-sparse compact my_ticket --format auto --target cpu --batch 1 32 --out compact
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ticket", help="a ticket's folder, or a finished run's")
    parser.add_argument("--out", required=True, help="folder to write: plan.json, compact.safetensors and compact.pt2")
    parser.add_argument(
        "--no-program", action="store_true", help="leave out compact.pt2, which loads without the factory"
    )
    parser.add_argument(
        "--format",
        default="channels",
        help="channels: cut channels; packed: run blocks as blocks too; dense: as it is; auto: the fastest on --target",
    )
    parser.add_argument("--target", help="round widths up to the multiple this target likes; what auto times on")
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        help="batches auto times at: it wins at the first and loses at none; by default what the target is tuned for",
    )
    parser.add_argument("--norms", default="exact", help="exact: channels that a norm counts may go; leave: they stay")
    parser.add_argument("--shortcuts", default="union", help="union: layers write what any of them writes; spread")


def execute(options: argparse.Namespace) -> int:
    from .. import artifact
    from ..api import compact

    source = Path(options.ticket)
    if (source / "run.json").is_file() and (source / "ticket").is_dir():
        source = source / "ticket"
    made = compact(
        source,
        format=options.format,
        target=options.target,
        batch=options.batch,
        norms=options.norms,
        shortcuts=options.shortcuts,
    )
    folder = made.save(options.out, program=not options.no_program)
    found = artifact.read_json(folder / "plan.json")
    program = "compact.pt2" in found["files"]
    why = found.get("program")
    summary = made.plan.summary()

    def text() -> str:
        left_out = f" without compact.pt2: {why}" if why else ""
        return "\n".join([plan_text(made.plan), str(made.parity), f"written to {options.out}{left_out}"])

    emit(options, {"folder": options.out, "program": program, "no_program": why, **summary}, text)
    return 0
