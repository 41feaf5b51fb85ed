"""Entry point of ``deploy-sparse``: finds the verb, runs it, turns errors into one message and an exit code."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from .. import __version__
from ..errors import DeploySparseError, MissingDependencyError, nearest

VERBS = {
    "run": "run a recipe: find a ticket, deploy it, measure it",
    "ls": "list recipes with their configs, and build targets",
    "cat": "print a recipe's configuration with the origin of each value",
    "cp": "copy a recipe or a config here, to edit",
    "show": "say what any artifact is",
    "inspect": "tables of layers: what surgery cuts, what stays and why; what an engine consists of",
    "ticket": "make a ticket that has a latency on a target",
    "table": "time a network's layers over their channel counts; which widths pay on a target",
    "compact": "cut a ticket into a smaller network and verify it",
    "build": "compile an engine for a target",
    "engines": "list, verify and clean up the engines in a folder",
    "bundle": "ship an engine: a model for Triton, or one file that rebuilds and proves itself elsewhere",
    "profile": "time engines against a baseline, interleaved in one run",
    "layers": "times of two engines' layers side by side, and why one did not gain what it could",
    "bench": "measure a suite: networks in sparse forms, on one or more targets, with one report",
    "report": "write the Markdown and HTML report of a run or of records",
    "doctor": "versions, hardware, what is missing and what that disables",
}

EPILOG = """examples:
  deploy-sparse run imp_refill --config resnet_digits
  deploy-sparse show runs/imp_refill-resnet_digits
  deploy-sparse build runs/imp_refill-resnet_digits/compact --target rtx-sm89
"""


class UsageError(DeploySparseError):
    """Words on the command line that fit no verb or option."""


class _Parser(argparse.ArgumentParser):
    """Raises argument errors in the form of all others."""

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().split()).removeprefix("usage: ")
        raise UsageError(message, expected=usage, fix=f"see {self.prog} --help")


_LIBRARIES = (
    "torch",
    "torchvision",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "safetensors",
)  # may be missing in a lean install


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for bad input, 128 + signal when stopped, 1 for a defect."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(words)
    except DeploySparseError as problem:
        _report(words, type(problem).__name__, problem.given, problem.expected, problem.fix)
        return problem.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; exit without a second error
        return 0
    except Exception as problem:
        if isinstance(problem, ModuleNotFoundError) and problem.name in _LIBRARIES:
            expected = f"all of the package's own dependencies; without {problem.name} engines can be run, but not this"
            fix = f"pip install {problem.name}"
            _report(words, MissingDependencyError.__name__, f"{problem.name} is not installed", expected, fix)
            return MissingDependencyError.exit_code
        given = f"{type(problem).__name__}: {problem}"
        fix = "run again with --debug and report the traceback"
        _report(words, "Defect", given, "no such error: a defect of deploy-sparse", fix)
        return 1


def _run(words: list[str]) -> int:
    if not words or words[0].startswith("-"):
        parser = _parser()
        parser.parse_args(words)
        parser.print_help()
        return 0
    if words[0] not in VERBS:
        hint = nearest(words[0], list(VERBS))
        fix = f"{hint}see deploy-sparse --help"
        raise UsageError(f"unknown verb {words[0]!r}", expected=f"one of {', '.join(VERBS)}", fix=fix)
    verb = import_module(f".{words[0]}", __package__)
    own = _Parser(
        prog=f"deploy-sparse {words[0]}",
        description=verb.__doc__,
        epilog=f"examples:\n{verb.EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.configure(own)
    own.add_argument("--json", action="store_true", help="print one JSON value instead of text")
    own.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if getattr(verb, "TAKES_OVERRIDES", False):
        if len(words) > 1 and words[1].startswith("--") and words[1] != "--help":
            own.error(f"{words[1]} stands before the recipe")  # its value would be taken for the recipe
        options, overrides = own.parse_known_args(words[1:])
        options.overrides = overrides
    else:
        options = own.parse_intermixed_args(words[1:])
    return int(verb.execute(options))


def _report(words: list[str], kind: str, given: str, expected: str, fix: str) -> None:
    if "--debug" in words:
        traceback.print_exc()
    print(f"error: {given}\n  expected: {expected}\n  next step: {fix}", file=sys.stderr)
    if "--json" in words:
        print(json.dumps({"error": {"kind": kind, "given": given, "expected": expected, "next_step": fix}}))


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, VERBS))
    table = "\n".join(f"  {name:<{width}}  {what}" for name, what in VERBS.items())
    parser = _Parser(
        prog="deploy-sparse",
        description="Structural lottery tickets that deploy.",
        usage="deploy-sparse VERB [options]",
        epilog=f"verbs (deploy-sparse VERB --help tells more):\n{table}\n\n{EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"deploy-sparse {__version__}")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
