"""The tables of surgery.py, from its record alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import Any

from deploy_sparse.measure.table import Cell, Table, markdown

TORCHVISION, TIMM, TIMM_GOAL = 80, 40, 38
EXACT = 1e-10
TOTAL_S, WORST_S = 90.0, 10.0
MACS_SLACK = 0.005  # of the dense network's: we round kept widths up, Torch-Pruning rounds them down
KINDS = ("silent", "live")

Row = dict[str, Any]


class Board:
    """The rows of a record by network and part; of a part measured again, the last."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.of: dict[str, dict[str, Row]] = {}
        self.runs = 1  # of what is timed
        for row in rows:
            if row["kind"] == "conditions":
                self.runs = row.get("runs", 1)
            if row["kind"] == "part":
                self.of.setdefault(row["model"], {})[row["part"]] = row
        self.models = tuple(sorted(self.of))

    def part(self, model: str, part: str) -> Row:
        """One row, empty where it was not measured."""
        return self.of[model].get(part, {})

    def exact(self, model: str, kind: str) -> bool:
        """Whether the network went through and was proven equal."""
        row = self.part(model, kind)
        return row.get("outcome") == "ok" and row["float64"] <= EXACT

    def peer(self, model: str) -> Row:
        """Torch-Pruning's better attempt: with its own help where that succeeded; empty where none did."""
        row = self.part(model, "peer")
        found = [row.get(attempt, {}) for attempt in ("own_help", "generic")]
        return next((entry for entry in found if entry.get("outcome") == "ok"), {})

    def having(self, part: str, prefix: str = "") -> list[str]:
        """The networks for which a part was measured."""
        return [model for model in self.models if part in self.of[model] and model.startswith(prefix)]

    def numbers(self, part: str, key: str, prefix: str = "") -> list[float]:
        """One number of every row that has it."""
        rows = [self.part(model, part) for model in self.having(part, prefix)]
        return [row[key] for row in rows if key in row and row.get("outcome") == "ok"]


def text(rows: Sequence[Row]) -> str:
    """The summary: goals, families, what stayed and why, and what did not go through."""
    board = Board(rows)
    found = (goals(board), families(board), reasons(board), failures(board), peer_failures(board))
    return "\n".join(f"**{table.title}**\n\n{markdown(table)}" for table in found if table.rows)


def details(rows: Sequence[Row]) -> str:
    """One row a network."""
    return f"# Surgery, network by network\n\n{markdown(networks(Board(rows)))}"


def goals(board: Board) -> Table:
    """What was asked for, and what was found."""
    return Table("Goals", ("goal", "found", "met"), tuple(_goals(board)))


def _goals(board: Board) -> Iterator[tuple[Cell, ...]]:
    for collection, count, goal in (("torchvision", TORCHVISION, TORCHVISION), ("timm", TIMM, TIMM_GOAL)):
        for kind in KINDS:
            models = board.having(kind, collection)
            exact = sum(board.exact(model, kind) for model in models)
            share = f"{goal} of {count}" if goal < count else f"all {count}"
            yield _goal(
                f"{share} of {collection} exact, {kind} masks", f"{exact} of {len(models)}", exact >= goal, models
            )
    errors = [value for kind in KINDS for value in board.numbers(kind, "float64")]
    yield _goal(
        f"relative error in float64 at most {EXACT:g}",
        f"{max(errors, default=0):.1e}",
        max(errors, default=1) <= EXACT,
        errors,
    )
    for kind in KINDS:
        both = [(board.part(m, kind), board.peer(m)) for m in board.models if board.exact(m, kind) and board.peer(m)]
        yield _faster([(own["cpu_s"], peer["cpu_s"]) for own, peer in both], f"{kind} masks")
        runs = [(own.get("cpu_runs"), peer.get("cpu_runs")) for own, peer in both]
        firsts = [(own[0], peer[0]) for own, peer in runs if own and peer]
        if firsts:
            yield _faster(firsts, f"{kind} masks, first of {board.runs} runs")
    for kind in KINDS:
        seconds = board.numbers(kind, "cpu_s", "torchvision")
        yield _goal(
            f"CPU seconds for torchvision's {TORCHVISION}: at most {TOTAL_S:g}, {kind} masks",
            f"{sum(seconds):.1f} for {len(seconds)}",
            sum(seconds) <= TOTAL_S and len(seconds) == TORCHVISION,
            seconds,
        )
    worst = max(((s, m) for k in KINDS for m in board.having(k) if (s := board.part(m, k).get("cpu_s"))), default=None)
    yield _goal(
        f"no network above {WORST_S:g} CPU seconds",
        "" if worst is None else f"{worst[0]:.1f} ({_short(worst[1])})",
        worst is not None and worst[0] <= WORST_S,
        worst,
    )
    for kind in KINDS:
        more = [
            (_kept(board.part(model, kind)) - _kept(board.peer(model)), model)
            for model in board.models
            if board.exact(model, kind) and board.peer(model)
        ]
        above = [entry for entry in more if entry[0] > MACS_SLACK]
        named = f"; most above: {_short(max(above)[1])}, by {max(above)[0]:.1%} of the dense MACs" if above else ""
        yield _goal(
            f"MACs kept no more than Torch-Pruning's (within {MACS_SLACK:.1%}), {kind} masks",
            f"{len(more) - len(above)} of {len(more)} networks{named}",
            not above,
            more,
        )
    for kind in KINDS:
        models = board.having(f"export-{kind}")
        agree = sum("onnx" in board.part(model, f"export-{kind}") for model in models)
        yield _goal(
            f"ONNX export that agrees in ONNX Runtime, {kind} masks",
            f"{agree} of {len(models)}",
            agree == len(models),
            models,
        )
    for kind in KINDS:
        able = [m for m in board.having(f"export-{kind}") if board.part(m, "export-dense").get("engine")]
        compiled = sum(bool(board.part(model, f"export-{kind}").get("engine")) for model in able)
        yield _goal(
            f"compiles with TensorRT-RTX where the dense network does, {kind} masks",
            f"{compiled} of {len(able)}",
            compiled == len(able),
            able,
        )


def _faster(pairs: Sequence[tuple[float, float]], which: str) -> tuple[Cell, ...]:
    ours, theirs = (median(column) if pairs else 0.0 for column in (list(zip(*pairs, strict=True)) or [(), ()]))
    return _goal(
        f"median CPU seconds below Torch-Pruning's, {which}",
        f"{ours:.2f} against {theirs:.2f}, on the {len(pairs)} networks that both get through"
        f" ({sum(own for own, _ in pairs):.0f} against {sum(peer for _, peer in pairs):.0f} s in all)",
        ours < theirs,
        pairs,
    )


def _goal(goal: str, found: str, met: bool, measured: Any) -> tuple[Cell, ...]:
    return (goal, found, "yes" if met else "no") if measured else (goal, "not measured", None)


def families(board: Board) -> Table:
    """A row a family, torchvision's first."""
    members: dict[tuple[str, str], list[str]] = defaultdict(list)
    for model in board.models:
        row = next(iter(board.of[model].values()))
        members[_collection(model), row["family"]].append(model)
    order = sorted(members, key=lambda key: (key[0] != "torchvision", key))
    rows = [(collection, family, *_family(board, members[collection, family])) for collection, family in order]
    total = [("", "all", *_family(board, list(board.models)))] if len(rows) > 1 else []
    columns = (
        *("collection", "family", "networks", "exact, silent", "exact, live", "CPU s, silent", "CPU s, live"),
        *("MACs kept, silent", "MACs kept, live", "Torch-Pruning: through", "equal, silent", "equal, live", "CPU s"),
        *("MACs kept", "ONNX agrees", "RTX compiles (dense)"),
    )
    counted = f"the median of {board.runs} runs in one process, " if board.runs > 1 else ""
    note = (
        "CPU s: tracing, plan and compaction, without the proof; of Torch-Pruning, dependency graph and pruning; "
        f"{counted}from the fastest to the slowest network. Torch-Pruning equal: its result against the network in "
        "which the channels that it removed are masked. ONNX and RTX: of the two compact networks of each dense one."
    )
    return Table("Families", columns, tuple((*rows, *total)), note)


def _family(board: Board, models: Sequence[str]) -> tuple[Cell, ...]:
    peers = [board.peer(model) for model in models if board.peer(model)]
    asked = sum("peer" in board.of[model] for model in models)
    exports = [board.part(m, f"export-{kind}") for kind in KINDS for m in models if f"export-{kind}" in board.of[m]]
    dense = [board.part(model, "export-dense") for model in models if "export-dense" in board.of[model]]
    return (
        len(models),
        *(_of(sum(board.exact(m, k) for m in models), sum(k in board.of[m] for m in models)) for k in KINDS),
        *(_spread([board.part(m, k)["cpu_s"] for m in models if "cpu_s" in board.part(m, k)], "{:.2f}") for k in KINDS),
        *(_spread([_kept(board.part(m, k)) for m in models if "macs" in board.part(m, k)], "{:.0%}") for k in KINDS),
        _of(len(peers), asked),
        *(_of(sum(peer["equal"].get(kind, False) for peer in peers), len(peers)) for kind in KINDS),
        _spread([peer["cpu_s"] for peer in peers], "{:.2f}"),
        _spread([_kept(peer) for peer in peers], "{:.0%}"),
        _of(sum("onnx" in row for row in exports), len(exports)),
        f"{_of(_engines(exports), len(exports)) or '–'} ({_of(_engines(dense), len(dense))})"
        if exports or dense
        else None,
    )


def reasons(board: Board) -> Table:
    """Why channels stay that masks empty, or that are never removed; the network's outputs left out."""
    models: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    channels: Counter[tuple[str, str, str]] = Counter()
    for kind in KINDS:
        for model in board.having(kind):
            for stay in board.part(model, kind).get("groups", {}).get("stays", ()):
                if stay["reason"] != "network output":
                    key = (kind, stay["kind"], stay["reason"])
                    channels[key] += stay["channels"]
                    models[key].add(model)
    cells = [(*key, len(models[key]), count) for key, count in channels.most_common(20)]
    return Table("What stays, and why", ("masks", "kind", "reason", "networks", "channels"), tuple(cells))


def failures(board: Board) -> Table:
    """Our parts that did not succeed."""
    rows = [
        (_short(model), part, row.get("stage"), row["reason"])
        for model in board.models
        for part, row in sorted(board.of[model].items())
        if part != "peer" and row["outcome"] != "ok"
    ]
    return Table("Not through", ("network", "part", "stage", "reason"), tuple(rows))


def peer_failures(board: Board) -> Table:
    """The networks that Torch-Pruning does not get through in any attempt."""
    rows = [
        (_short(model), row.get("own_help", row.get("generic", row)).get("reason", row.get("reason")))
        for model in board.having("peer")
        if not board.peer(model) and (row := board.part(model, "peer"))
    ]
    return Table("Not through with Torch-Pruning", ("network", "reason"), tuple(rows))


def networks(board: Board) -> Table:
    """Everything measured of each network."""
    columns = (
        *("network", "pixels", "parameters", "kept", "MACs kept, silent", "live", "error in float64, silent", "live"),
        *(
            "in float32, silent",
            "live",
            "CPU s, silent",
            "live",
            "peak GiB",
            "Torch-Pruning: MACs kept",
            "CPU s",
            "help",
        ),
        *("error in float64, silent", "live", "ONNX error, silent", "live", "RTX: dense", "silent", "live"),
    )
    return Table("Networks", columns, tuple(_network(board, model) for model in board.models))


def _network(board: Board, model: str) -> tuple[Cell, ...]:
    silent, live, peer = board.part(model, "silent"), board.part(model, "live"), board.peer(model)
    own = (silent, live)
    exports = [board.part(model, f"export-{kind}") for kind in KINDS]
    helped = peer is board.part(model, "peer").get("own_help")
    before, after = silent.get("parameters", (None, 1))
    return (
        _short(model),
        next(iter(board.of[model].values()))["image"],
        before,
        f"{after / before:.1%}" if before else None,
        *(f"{_kept(row):.1%}" if "macs" in row else None for row in own),
        *(_error(row.get("float64")) for row in own),
        *(_error(row.get("float32")) for row in own),
        *(row.get("cpu_s") for row in own),
        max((row["peak_gib"] for row in own if "peak_gib" in row), default=None),
        f"{_kept(peer):.1%}" if peer else None,
        peer.get("cpu_s"),
        ("own" if helped else "none") if peer else None,
        *(_error(peer.get("float64", {}).get(kind)) for kind in KINDS),
        *(_error(row.get("onnx", {}).get("max_rel")) for row in exports),
        *(_engine(row) for row in (board.part(model, "export-dense"), *exports)),
    )


def _engine(row: Row) -> Cell:
    if not row:
        return None
    return f"{row['engine']['bytes'] / 1e6:.1f} MB" if row.get("engine") else "no"


def _engines(rows: Iterable[Row]) -> int:
    return sum(bool(row.get("engine")) for row in rows)


def _kept(row: Row) -> float:
    return float(row["macs"][1] / row["macs"][0])


def _of(count: int, total: int) -> Cell:
    return f"{count} / {total}" if total else None


def _spread(values: Sequence[float], form: str) -> Cell:
    if not values:
        return None
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def _error(value: float | None) -> Cell:
    return None if value is None else f"{value:.1e}"


def _collection(model: str) -> str:
    return model.partition("/")[0]


def _short(model: str) -> str:
    return model.removeprefix("torchvision/")
