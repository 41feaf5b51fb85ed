"""What TensorRT says when something fails, as one line for people. Imports no library."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_LONGEST = 600
_TAIL = re.compile(r"(?:[ .]*\bIn \S+ at \S+:\d+)+[ .)]*$")  # functions and lines of its source
_PLACE = re.compile(r"^(?:\[[^\[\]]*::\d+\] |\w+::\w+: )")  # [optimizer.cpp::computeCosts::4048] or IBuilder::buildX:
_CODE = re.compile(r"^Error Code \d+: [A-Za-z ]+ \((.*)$")
_INNER = re.compile(r"^(?:\[\w+\.\w+:\d+: \w+\] |\w+Exception: |\w+\.\w+:\d+: )+|^.*Assertion failed: (?:(?!: ).)*: ")
_NO_DRIVER = re.compile(r"CUDA driver version is insufficient|cudaError 35\b")
_MEMORY = re.compile(r"out ?of ?memory|insufficient memory|cannot allocate|failed to allocate|bad_alloc", re.IGNORECASE)


def readable(messages: Iterable[str]) -> str:
    """The messages in one line, each once, without names of source files and functions; empty where there are none."""
    lines = [line for message in messages for line in message.splitlines()]
    # a missing driver is no reason: it is named where there is no other, as ahead of time no GPU is needed
    lines = [line for line in lines if not _NO_DRIVER.search(line)] or lines
    return "; ".join(dict.fromkeys(filter(None, map(_plain, lines))))[:_LONGEST]


def refusal(problem: Any, said: Iterable[str]) -> str:
    """Which node the parser refuses and why, from its error and what it logged.

    A node without a name goes by its position and by what it writes.
    """
    name, index, operator = problem.node_name(), problem.node(), problem.node_operator()
    why = readable([problem.desc()])
    if why == "false" or "Plugin not found" in why:
        why = "TensorRT has no such operator, or not in this form"
    if index < 0 and not name:
        return why
    place = repr(name) if name else str(index)
    written = re.search(rf'node number {index} \[\S+ -> "([^"]+)"\]', "\n".join(said))
    if not name and written:
        place = f"{index}, which writes {written[1]!r}"
    return f"node {place} ({operator}): {why}"


def ran_out_of_memory(messages: Iterable[str]) -> bool:
    """Whether one of the messages says so."""
    return any(_MEMORY.search(message) for message in messages)


def _plain(line: str) -> str:
    text = _PLACE.sub("", " ".join(line.split()))
    found = _CODE.match(text)
    if found:
        inside = found[1].removesuffix(".").removesuffix(")")
        text = _TAIL.sub("", inside)
    text = _INNER.sub("", _TAIL.sub("", text)).strip(" .")
    return text + ")" * (text.count("(") - text.count(")"))
