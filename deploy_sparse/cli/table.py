"""Time a network's layers over their channel counts: the staircase, the multiple to round widths to, and a table that
predicts the latency of any narrower network. Goes on where it was stopped."""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .output import emit

EXAMPLES = """  deploy-sparse table --target cpu --network torchvision/resnet50
  deploy-sparse table --target cpu --network resnet18 --input-size 32 --batch 8 --out tables/resnet18
  deploy-sparse table --target cpu --network runs/imp_refill-resnet_digits/compact --cuts 0.25 0.5
"""
CUTS = (0.3, 0.5, 0.7)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", default="cpu", help="a target's name (deploy-sparse ls) or TOML file; it runs here")
    parser.add_argument(
        "--network", default="torchvision/resnet50", help="a zoo network, or the folder of a compact network or ticket"
    )
    parser.add_argument("--input-size", type=int, metavar="PIXELS", help="height and width; the network's by default")
    parser.add_argument("--batch", type=int, default=1, help="samples of a call; 1 by default")
    parser.add_argument("--out", help="folder for table.json and the report; tables/NETWORK-TARGET-BATCH by default")
    parser.add_argument("--seconds", type=float, default=420.0, help="of refining, at most; 420 by default")
    parser.add_argument("--network-seconds", type=float, default=2.0, help="timed seconds of each whole network")
    parser.add_argument(
        "--cuts",
        type=float,
        nargs="*",
        metavar="SHARE",
        help="shares of channels to cut for the networks that the table is checked on; 0.3 0.5 0.7 by default",
    )


def execute(options: argparse.Namespace) -> int:
    from ..measure.table import plain
    from ..train.interrupt import Interrupts
    from ..tune.latency.measure import measure
    from ..tune.latency.show import cuts_table, layers_table, summary, write_table
    from ..tune.layer_bench import layer_times_folder

    network, inputs = network_and_inputs(options.network, options.input_size)
    out = Path(options.out) if options.out else Path("tables") / _name(options)
    _refuse_run(out)
    command = f"deploy-sparse table {shlex.join(_words(options, out))}"
    with Interrupts(command) as interrupts:
        made = measure(
            network,
            inputs,
            options.target,
            batch=options.batch,
            seconds=options.seconds,
            network_s=options.network_seconds,
            rounds=15,
            cuts=CutNetworks(
                network, inputs, CUTS if options.cuts is None else options.cuts, strict=bool(options.cuts)
            ),
            cache=layer_times_folder(),
            poll=lambda: interrupts.poll("every time measured so far is kept"),
            say=lambda line: print(line, file=sys.stderr),
        )
    table = made.table
    title = f"Latency table: {options.network} on {table.target['name']}, batch {table.batch}"
    path = write_table(out, made, title=title, command=command)
    value = {
        "table": str(path),
        "report": str(out / "report.html"),
        "target": table.target["name"],
        "batch": table.batch,
        "dense_ms": table.dense_ms,
        "rest_ms": table.rest_ms,
        "context": table.context,
        "multiple": table.multiple,
        "width_multiple_of_target": table.target["width_multiple"],
        "layers": len(table.layers),
        "shapes": len(table.surfaces),
        "points": sum(len(surface.points) + len(surface.checks) for surface in table.surfaces.values()),
        "settled": all(surface.settled for surface in table.surfaces.values()),
        "error": table.error,
        "cuts": [{"name": c.name, "measured": c.ratio, "predicted": c.predicted, "error": c.error} for c in table.cuts],
    }

    def text() -> str:
        parts = [plain(found).rstrip("\n") for found in (cuts_table(table), layers_table(table)) if found.rows]
        return "\n\n".join([*parts, "\n".join([*summary(table), f"written to {path} and {out / 'report.html'}"])])

    emit(options, value, text)
    return 0


class CutNetworks:
    """Narrower copies of a network: the share of the channels with the least weight goes, by magnitude.

    Where one cannot be made, those before it have to do, with a note on standard error; an error if ``strict``.
    """

    def __init__(self, network: Any, inputs: Any, shares: Sequence[float], *, strict: bool) -> None:
        self.network, self.inputs, self.shares, self.strict = network, inputs, tuple(dict.fromkeys(shares)), strict

    def __call__(self, multiple: int) -> Mapping[str, Any]:
        from ..errors import ConfigError, SurgeryError
        from ..surgery.compact import compact

        found = {}
        try:
            for share in self.shares:
                made = compact(self._ticket(share, multiple), lambda: copy.deepcopy(self.network), self.inputs)
                found[f"{100 * share:g} % of channels cut"] = made.module
        except (ConfigError, SurgeryError) as problem:
            if self.strict:
                raise
            print(f"note: no more cut networks to check the table on: {problem.given}", file=sys.stderr)
        return found

    def _ticket(self, share: float, multiple: int) -> Any:
        """Widths in whole multiples, or in smaller ones where whole ones would leave every layer as it is."""
        from ..api import oneshot_ticket
        from ..errors import ConfigError

        try:
            return oneshot_ticket(self.network, self.inputs, "channels", share, multiple=multiple)
        except ConfigError:
            if multiple == 1:
                raise
            return self._ticket(share, multiple // 2)


def network_and_inputs(name: str, size: int | None) -> tuple[Any, Any]:
    """The network in evaluation mode and two random samples for it."""
    import torch

    from .. import zoo
    from ..errors import ConfigError
    from .subject import module_or_onnx

    if size is not None and size < 1:
        raise ConfigError(f"an input size of {size}", expected="pixels, from 1 on", fix="give for example 224")
    if name.endswith(".onnx"):
        raise ConfigError(
            f"{name} is an ONNX file",
            expected="a network whose channels can be cut: a zoo network, or a compact network's or ticket's folder",
            fix="name the network that the file was exported from",
        )
    torch.manual_seed(0)
    if Path(name).is_dir() or (Path(name).exists() and not zoo.known(name)):
        network, (x,) = module_or_onnx(name)  # type: ignore[misc]  # inputs are missing for ONNX files alone
        shape = tuple(x.shape[1:])
    else:
        shape = zoo.entry(name).input_shape
        network = zoo.build(name).eval()
    if size is not None:
        if len(shape) != 3:
            raise ConfigError(
                f"an input size with inputs of shape {list(shape)}", expected="a network of images", fix="leave it out"
            )
        shape = (shape[0], size, size)
    return network, torch.randn(2, *shape)


def _name(options: argparse.Namespace) -> str:
    network, target = (Path(text).name.removesuffix(".toml") for text in (options.network, options.target))
    size = f"-{options.input_size}" if options.input_size else ""
    return f"{network}{size}-{target}-{options.batch}"


def _words(options: argparse.Namespace, out: Path) -> list[str]:
    words = ["--target", options.target, "--network", options.network, "--batch", str(options.batch)]
    if options.input_size:
        words += ["--input-size", str(options.input_size)]
    if options.cuts is not None:
        words += ["--cuts", *(f"{share:g}" for share in options.cuts)]
    return [*words, "--seconds", f"{options.seconds:g}", "--out", str(out)]


def _refuse_run(out: Path) -> None:
    from ..errors import ArtifactError

    if (out / "run.json").is_file():
        raise ArtifactError(
            f"{out} holds a run with a report of its own",
            expected="a folder for the table alone",
            fix="choose a folder with --out DIR",
        )
