"""Entry point of ``deploy-sparse``: finds the verb, runs it, turns errors into one message and an exit code."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..errors import DeploySparseError, nearest

VERBS = {
    "run": "run a recipe: find a ticket, deploy it, measure it",
    "ls": "list recipes with their configs, and build targets",
    "cat": "print a recipe's configuration with the origin of each value",
    "cp": "copy a recipe or a config here, to edit",
    "show": "say what any artifact is",
    "compact": "cut a ticket into a smaller network and verify it",
    "build": "compile an engine for a target",
    "profile": "time engines against a baseline, interleaved in one run",
    "report": "write the Markdown and HTML report of a run or of records",
    "doctor": "versions, hardware, what is missing and what that disables",
}

EPILOG = """examples:
  deploy-sparse run imp_refill --config resnet_digits
  deploy-sparse show runs/imp_refill-resnet_digits
  deploy-sparse build runs/imp_refill-resnet_digits/compact --target rtx-sm89
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for bad input, 128 + signal when stopped, 1 for a defect."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    if not words or words[0] not in VERBS:
        return _without_verb(parser, words)
    verb = import_module(f".{words[0]}", __package__)
    own = argparse.ArgumentParser(
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
        options, options_rest = own.parse_known_args(words[1:])
        options.overrides = options_rest
    else:
        options = own.parse_args(words[1:])
    return _guarded(verb.execute, options)


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, VERBS))
    table = "\n".join(f"  {name:<{width}}  {what}" for name, what in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="deploy-sparse",
        description="Structural lottery tickets that deploy.",
        usage="deploy-sparse VERB [options]",
        epilog=f"verbs (deploy-sparse VERB --help tells more):\n{table}\n\n{EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"deploy-sparse {__version__}")
    return parser


def _without_verb(parser: argparse.ArgumentParser, words: list[str]) -> int:
    if not words:
        parser.print_help()
        return 0
    if not words[0].startswith("-"):
        hint = nearest(words[0], list(VERBS))
        print(
            f"error: unknown verb {words[0]!r}\n  expected: one of {', '.join(VERBS)}\n"
            f"  next step: {hint}see deploy-sparse --help",
            file=sys.stderr,
        )
        return 2
    parser.parse_args(words)
    return 0


def _guarded(execute: object, options: argparse.Namespace) -> int:
    try:
        return int(execute(options) or 0)  # type: ignore[operator]
    except DeploySparseError as problem:
        if options.debug:
            traceback.print_exc()
        print(f"error: {problem}", file=sys.stderr)
        if options.json:
            print(
                json.dumps(
                    {
                        "error": {
                            "kind": type(problem).__name__,
                            "given": problem.given,
                            "expected": problem.expected,
                            "next_step": problem.fix,
                        }
                    }
                )
            )
        return problem.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; exit without a second error
        return 0
    except Exception as problem:
        if options.debug:
            raise
        print(
            f"error: {type(problem).__name__}: {problem}\n  expected: no such error: a defect of deploy-sparse\n"
            "  next step: run again with --debug and report the traceback",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
