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
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ticket", help="a ticket's folder, or a finished run's")
    parser.add_argument("--out", required=True, help="folder to write: plan.json and compact.safetensors")
    parser.add_argument("--target", help="round widths up to the multiple this target likes")


def execute(options: argparse.Namespace) -> int:
    from ..api import compact

    source = Path(options.ticket)
    if (source / "run.json").is_file() and (source / "ticket").is_dir():
        source = source / "ticket"
    made = compact(source, target=options.target)
    made.save(options.out)
    summary = made.plan.summary()

    def text() -> str:
        return "\n".join([plan_text(made.plan), str(made.parity), f"written to {options.out}"])

    emit(options, {"folder": options.out, **summary}, text)
    return 0
