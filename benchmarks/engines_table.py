"""The tables of engines.py, from its record alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from deploy_sparse.measure.table import Cell, Table, markdown

PARITY = 1e-4  # largest difference over the largest result
AGAIN_S = 0.2
LACKING = ("operators that", "a network the compiler supports")  # what errors expect where the runtime lacks operators

Row = dict[str, Any]


class Board:
    """The rows of a record by network and form, and then by target and precision; of one measured again, the last."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.of: dict[tuple[str, str], dict[tuple[str, str], Row]] = {}
        self.rtx, self.forms = "", ()
        self.networks: dict[str, list[str]] = {"zoo": [], "torchvision": []}
        for row in rows:
            if row["kind"] == "conditions":
                self.rtx, self.forms = row["targets"]["rtx"], tuple(row["forms"])
                for name in row["data"]:
                    self.networks["torchvision" if _extra(name) else "zoo"].append(name)
            else:
                own = self.of.setdefault((row["network"], row["form"]), {})
                own[row["target"], row["precision"]] = row

    def rows(self, target: str = "", precision: str = "") -> list[Row]:
        """All that were measured, or those of a target or precision."""
        return [
            row
            for own in self.of.values()
            for (its, in_), row in own.items()
            if target in ("", its) and precision in ("", in_)
        ]

    @property
    def attempts(self) -> tuple[tuple[str, str], ...]:
        """Targets and precisions in the order of measurement."""
        return tuple(dict.fromkeys(key for own in self.of.values() for key in own))


def text(rows: Sequence[Row]) -> str:
    """Goals, what compiled, agreement, sizes and times, and the reasons of what failed."""
    board = Board(rows)
    found = (goals(board), compiled(board), agreement(board), costs(board), failures(board))
    return "\n".join(f"**{table.title}**\n\n{markdown(table)}" for table in found if table.rows)


def goals(board: Board) -> Table:
    """What was asked for, and what was found."""
    forms = ", ".join(board.forms)
    note = (
        f"Networks compile in each form ({forms}), but where the compiler says that it lacks an operator. Parity: the "
        f"export is within {PARITY:g} of the module, the engine within that and its manifest's own agreement."
    )
    return Table("Goals", ("goal", "found", "met"), tuple(_goals(board)), note)


def _goals(board: Board) -> Iterator[tuple[Cell, ...]]:
    for collection, networks in board.networks.items():
        wanted = len(networks) * len(board.forms)
        for target, precision in [key for key in board.attempts if key[0] == board.rtx]:
            rows = [row for row in board.rows(target, precision) if row["network"] in networks]
            if rows or collection == "zoo":
                yield _all_compile(f"every {collection} network compiles for {target} in {precision}", rows, wanted)
    for precision in [key[1] for key in board.attempts if key[0] == "cpu"]:
        rows = board.rows("cpu", precision)
        close = [row for row in rows if _as_told(row)]
        what = f"{len(close)} of {len(rows)}"
        if close:
            graph, engine = (max(row[key]["max_rel"] for row in close) for key in ("parity", "ran"))
            what += f"; largest error of an export {graph:.1e}, of an engine {engine:.1e}"
        yield f"parity of every ONNX Runtime engine, {precision}", what, _yes(0 < len(rows) == len(close))
    timed = [row for row in board.rows() if "again_s" in row]
    if timed:
        slowest = max(timed, key=lambda row: row["again_s"])
        fast = sum(row["again_s"] < AGAIN_S for row in timed)
        built = sum(_compiled(row) for row in board.rows())
        yield (
            f"second identical build < {AGAIN_S:g} s",
            f"{fast} of {built}; slowest {slowest['again_s']:.3f} s ({_short(slowest)})",
            _yes(fast == built),
        )


def _all_compile(goal: str, rows: Sequence[Row], wanted: int) -> tuple[Cell, ...]:
    able = sum(_compiled(row) for row in rows)
    lacking = sum(not _compiled(row) and row.get("expected", "").startswith(LACKING) for row in rows)
    what = f"{able} of {len(rows)}" + (f", {lacking} with operators that it lacks" if lacking else "")
    return goal, what + (f"; {wanted} wanted" if len(rows) < wanted else ""), _yes(able + lacking == wanted)


def _as_told(row: Row) -> bool:
    """Whether the export equals the module, and the engine is as close to it as its manifest says."""
    told = (row.get("agreement") or {}).get("max_rel", 0.0)
    close: bool = (
        row["outcome"] == "ok" and row["parity"]["max_rel"] <= PARITY and row["ran"]["max_rel"] <= told + PARITY
    )
    return close


def compiled(board: Board) -> Table:
    """One row a network and form: whether each attempt built, or why not."""
    note = (
        "ok: built, and the precision that was read back is the one asked for. Without: layers of int8 and fp8 that "
        "are not quantized."
    )
    return _by_attempt(board, "Built", _state, note)


def agreement(board: Board) -> Table:
    """One row a network and form: how close each lower precision is to fp32."""
    note = (
        "Share of images whose highest score is the same one, and the mean difference over the mean magnitude. Weights "
        "are untrained; each score's mean over the images was taken off, so both are about what tells images apart. "
        "Classes: how many of them have the highest score of some image. "
        "fp16 and bf16 of TensorRT-RTX: computed on the CPU with every operator's result rounded."
    )
    lower = [key for key in board.attempts if key[1] != "fp32"]
    return _by_attempt(board, "Agreement with fp32", _agreement, note, lower, ("classes",))


def costs(board: Board) -> Table:
    """One row a network and form: megabytes, seconds to build, milliseconds of the second identical build."""
    note = "MB of the plan or graph / seconds to build / milliseconds of the second identical build."
    return _by_attempt(board, "Size and time", _cost, note, None, ("of_dense", "packed_layers"))


def failures(board: Board) -> Table:
    """Attempts that did not succeed."""
    rows = [
        (_network(row["network"]), row["form"], row["target"], row["precision"], row.get("stage"), row["reason"])
        for row in board.rows()
        if row["outcome"] != "ok"
    ]
    return Table("Not through", ("network", "form", "target", "precision", "stage", "reason"), tuple(rows))


def _by_attempt(
    board: Board,
    title: str,
    cell: Callable[[Row], Cell],
    note: str,
    attempts: Sequence[tuple[str, str]] | None = None,
    facts: Sequence[str] = (),
) -> Table:
    shown = board.attempts if attempts is None else tuple(attempts)
    columns = ("network", "form", *(_FACTS[fact][0] for fact in facts), *(f"{t} {p}" for t, p in shown))
    rows = []
    for (network, form), own in board.of.items():
        first = next(iter(own.values()))
        cells = [cell(own[key]) if key in own else None for key in shown]
        rows.append((_network(network), form, *(_FACTS[fact][1](first) for fact in facts), *cells))
    return Table(title, columns, tuple(rows), note)


def _state(row: Row) -> Cell:
    if row["outcome"] != "ok":
        return f"no, {row.get('stage') or 'process'}: {_cut(row['reason'])}"
    return f"ok, {row['unquantized']} without" if row.get("unquantized") else "ok"


def _agreement(row: Row) -> Cell:
    found = row.get("agreement")
    if not found:
        return None
    if "why_not" in found:
        return _cut(found["why_not"])
    return f"{found['top1']:.1%}, {found['mean_rel']:.2%}" if found["top1"] is not None else f"{found['mean_rel']:.2%}"


def _cost(row: Row) -> Cell:
    if not _compiled(row):
        return None
    again = f"{1e3 * row['again_s']:.0f}" if "again_s" in row else "–"
    return f"{row['bytes'] / 1e6:.2f} / {row['seconds']:.1f} / {again}"


def _kept(row: Row) -> Cell:
    return f"{row['of_dense']['macs']:.0%}" if "of_dense" in row else None


_FACTS: dict[str, tuple[str, Callable[[Row], Cell]]] = {
    "classes": ("classes", lambda row: row.get("classes")),
    "of_dense": ("MACs of dense", _kept),
    "packed_layers": ("layers packed", lambda row: row.get("packed_layers")),
}


def _compiled(row: Row) -> bool:
    """Whether there is an engine, whatever became of it later."""
    return bool(row.get("built") == row["precision"])


def _cut(reason: str) -> str:
    return reason if len(reason) <= 60 else f"{reason[:59]}…"


def _extra(name: str) -> bool:
    return name.startswith("torchvision/")


def _network(name: str) -> str:
    return f"{name.removeprefix('torchvision/')} (224)" if _extra(name) else name


def _short(row: Row) -> str:
    return f"{_network(row['network'])}, {row['form']}, {row['target']} {row['precision']}"


def _yes(met: bool) -> str:
    return "yes" if met else "no"
