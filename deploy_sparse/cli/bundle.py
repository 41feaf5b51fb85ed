"""Ship an engine to another machine, and take one in.

triton: a model in a Triton Inference Server repository: OUT/<model>/config.pbtxt and OUT/<model>/1/ with the engine.
zip: one file with the ONNX graph, the target, the manifest and a parity sample. On the receiving machine --verify
checks every hash and runs the graph on the sample; --rebuild builds the engine again, for its own target or another,
and proves that on the sample. Nothing that exists is overwritten.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import emit, key_values
from .stopping import ended_cleanly

if TYPE_CHECKING:
    from ..bundle.opened import Bundle

EXAMPLES = """  deploy-sparse bundle engines/out/model-cpu-0123456789ab --format zip --out model.zip
  deploy-sparse bundle --verify model.zip
  deploy-sparse bundle --rebuild model.zip --out engines/out --target rtx-sm89
  deploy-sparse bundle engines/out/model-cpu-0123456789ab --format triton --out models --labels classes.txt
"""
_OPTIONS = {  # what each task takes; engine is the positional argument
    "bundling": {"format", "out", "name", "labels", "tolerance"},
    "--verify": {"verify"},
    "--rebuild": {"rebuild", "out", "name", "target", "calibration"},
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engine", nargs="?", help="the engine's folder")
    parser.add_argument("--format", help="triton, or zip")
    parser.add_argument("--out", help="the repository's folder or the .zip file; with --rebuild the folder for engines")
    parser.add_argument("--name", help="of the model in Triton, or of the rebuilt engine; the engine's by default")
    parser.add_argument("--labels", metavar="FILE", help="triton: a file with one name of a class in each line")
    parser.add_argument(
        "--tolerance", type=float, help="zip: the largest difference, of the largest output, that passes elsewhere"
    )
    parser.add_argument("--verify", metavar="FILE.zip", help="check a bundle; nothing is built")
    parser.add_argument("--rebuild", metavar="FILE.zip", help="build a bundle's engine here and prove it")
    parser.add_argument("--target", help="with --rebuild: another target than the bundle's; a name or a TOML file")
    parser.add_argument("--calibration", metavar="DATA", help="with --rebuild: real inputs, as for deploy-sparse build")


def execute(options: argparse.Namespace) -> int:
    from ..errors import ConfigError

    given = [words for words in ("engine", "verify", "rebuild") if getattr(options, words) is not None]
    if len(given) != 1:
        raise ConfigError(
            f"{' and '.join(given)} given at once" if given else "nothing to bundle, verify or rebuild is given",
            expected="an engine's folder with --format and --out, or --verify FILE.zip, or --rebuild FILE.zip",
            fix="see deploy-sparse bundle --help",
        )
    task = "bundling" if given == ["engine"] else f"--{given[0]}"
    for name in sorted(set().union(*_OPTIONS.values()) - _OPTIONS[task]):
        if getattr(options, name) is not None:
            takers = ", ".join(known for known, names in _OPTIONS.items() if name in names)
            raise ConfigError(f"--{name} with {task}", expected=f"--{name} with {takers} only", fix="drop it")
    with ended_cleanly():
        return {"bundling": _bundle, "--verify": _verify, "--rebuild": _rebuild}[task](options)


def _bundle(options: argparse.Namespace) -> int:
    from ..bundle import bundle_engine
    from ..errors import ConfigError

    for name, example in (("format", "zip"), ("out", "model.zip")):
        if getattr(options, name) is None:
            raise ConfigError(
                f"--{name} is missing", expected="--format triton or zip, and --out PATH", fix=f"add --{name} {example}"
            )
    made = bundle_engine(
        options.engine,
        format=options.format,
        out=options.out,
        name=options.name,
        labels=None if options.labels is None else _lines(Path(options.labels)),
        tolerance=options.tolerance,
    )
    value = {"path": str(made.path), "format": made.format, "notes": list(made.notes)}
    emit(options, value, lambda: "\n".join([key_values({"bundle": made.path, "format": made.format}), *made.notes]))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from ..bundle import open_bundle

    bundle = open_bundle(options.verify)
    proof = bundle.verify()
    value = {**_facts(bundle), "proof": asdict(proof)}
    emit(options, value, lambda: "\n".join([key_values(_facts(bundle)), str(proof)]))
    return 0


def _rebuild(options: argparse.Namespace) -> int:
    from ..bundle import open_bundle

    bundle = open_bundle(options.rebuild)
    out = options.out or "engines/out"
    done = bundle.rebuild(out, target=options.target, name=options.name, calibration=options.calibration)
    facts = {**_facts(bundle), "engine": str(done.engine.folder), "target": done.engine.target.name}
    emit(
        options,
        {**facts, "cached": done.engine.cached, "proof": asdict(done.proof)},
        lambda: "\n".join([key_values(facts), str(done.proof)]),
    )
    return 0


def _facts(bundle: Bundle) -> dict[str, Any]:
    return {
        "bundle": str(bundle.path),
        "name": bundle.name,
        "digest": bundle.digest,
        "target": bundle.target.name,
        "built by": " ".join(bundle.manifest["runtime"].values()),
        "files": len(bundle.files),
    }


def _lines(path: Path) -> list[str]:
    from ..errors import ConfigError

    try:
        return path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(
            f"{path} cannot be read ({problem})", expected="a text file with one name in each line", fix="check it"
        ) from None
