"""Which channels really go: the dead ones, less those that sizes, products of axes, widths and constants hold back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ._axes import Ledger, Read
from ._equations import Equation, Extents, Positions, equations
from ._provenance import Derived, Expr, Extent, Setting, evaluate, leaves
from ._widths import width_sets
from .account import account
from .graph import memberships
from .liveness import carries, folds, liveness, stuck
from .parts import GroupPlan, Kind

_ROUNDS = 1000
_LEAST_CARRIER = 0.1  # of the largest constant that goes


@dataclass
class Choice:
    """What goes.

    Attributes:
        removed: bool by channel (smallest joined atom).
        settings: new values of attributes that the code reads sizes from.
        groups: what stays in each group and why.
        carriers: for each read, by column that carries constants: the columns whose constants it takes up.
    """

    removed: np.ndarray
    settings: dict[Setting, int] = field(default_factory=dict)
    groups: tuple[GroupPlan, ...] = ()
    carriers: list[tuple[Read, dict[int, list[int]]]] = field(default_factory=list)


def choose(ledger: Ledger, multiple: int) -> Choice:
    """What stays in each group, and the removed channels."""
    return _Chooser(ledger, multiple).run()


def choose_alike(ledgers: Sequence[Ledger], multiple: int) -> list[Choice]:
    """:func:`choose`, letting go only what can go at all input sizes, where other operations run."""
    while True:
        choices = [choose(each, multiple) for each in ledgers]
        kept: dict[tuple[str, int], np.ndarray] = {}
        for each, choice in zip(ledgers, choices, strict=True):
            for key, alive in _kept(each, choice).items():
                kept[key] = alive | kept[key] if key in kept else alive
        changed = False
        for each, choice in zip(ledgers, choices, strict=True):
            for key, axis in each.axes.items():
                roots = torch.from_numpy(each.roots_of(axis))
                gone = (roots >= 0) & torch.from_numpy(choice.removed)[roots.clamp(min=0)]
                back = gone & torch.from_numpy(kept[key]).expand(gone.shape)
                if axis.atoms.dim() > 1:  # a position stays for the sake of any of its channels
                    back &= gone.all(dim=0)
                if bool(back.any()):
                    each.atoms.pin(roots[back], _OTHER_SIZES)
                    changed = True
        if not changed:
            return choices


_OTHER_SIZES = "it is needed at other input sizes, where the network runs other operations"


def _kept(ledger: Ledger, choice: Choice) -> dict[tuple[str, int], np.ndarray]:
    """Which positions of each tensor axis stay."""
    found = {}
    for key, axis in ledger.axes.items():
        roots = ledger.roots_of(axis)
        alive = (roots < 0) | ~choice.removed[np.maximum(roots, 0)]
        found[key] = alive.any(axis=0) if alive.ndim > 1 else alive
    return found


class _Chooser:
    """Starts with every channel nobody needs and gives back until nothing is violated."""

    def __init__(self, ledger: Ledger, multiple: int) -> None:
        self.ledger, self.multiple = ledger, multiple
        self.members = memberships(ledger)
        self.widths = width_sets(ledger, self.members) if multiple > 1 else []
        self.state = liveness(ledger)
        self.extents, self.equations = Extents(ledger), equations(ledger)
        self.grids = [ledger.atoms.roots(grid.atoms).numpy() for grid in ledger.grids]
        self.axes = [ledger.roots_of(axis) for axis in ledger.axes.values()]
        self.reads = [(r, ledger.atoms.roots(r.atoms).numpy()) for r in ledger.reads if not folds(r) and carries(r)]
        self.fixed_reads = [
            (r, ledger.atoms.roots(r.atoms).numpy(), ledger.atoms.roots(r.rows).numpy())
            for r in ledger.reads
            if not folds(r) and not carries(r)
        ]
        self.dense = {
            leaf: self._setting(leaf)
            for leaf in {leaf for e in self.equations for leaf in leaves(e.expr) if isinstance(leaf, Setting)}
        }
        self.balanced = [
            ([Positions(ledger.atoms.roots(part).numpy()) for part in parts], where) for parts, where in ledger.balanced
        ]
        self.why: dict[int, tuple[Kind, str]] = {}
        self.removed = self._dead()

    def run(self) -> Choice:
        steps: Sequence[Callable[[], bool]] = (
            self._products,
            self._nothing_empty,
            self._balance,
            self._sizes,
            self._widths,
            self._constants,
            self._stuck,
        )
        for _ in range(_ROUNDS):
            if not any([step() for step in steps]):
                return Choice(
                    self.removed,
                    self._settings(),
                    account(self.ledger, self.members, self.state, self.removed, self.why),
                    self._carriers(),
                )
        raise RuntimeError("the sizes of the narrowed network do not settle")  # each round gives something back

    def _dead(self) -> np.ndarray:
        """What nobody needs: channels that layers write, and positions that hold nothing but products of them."""
        removed = np.zeros(self.ledger.atoms.count, dtype=bool)
        everything = np.arange(self.ledger.atoms.count)
        roots = self.ledger.atoms._roots(everything) if len(everything) else everything
        removed[np.unique(roots)] = True
        removed &= ~self.state.needed
        removed[list(self.state.leaks)] = False
        for root in self.ledger.atoms.pins():
            removed[root] = False
        return removed

    def _give_back(self, roots: Iterable[int], kind: Kind, reason: str) -> bool:
        back = [root for root in roots if root >= 0 and self.removed[root]]
        for root in back:
            self.removed[root] = False
            self.why[root] = (kind, reason)
        return bool(back)

    def _alive(self, roots: np.ndarray) -> np.ndarray:
        alive: np.ndarray = (roots < 0) | ~self.removed[np.maximum(roots, 0)]
        return alive

    def _products(self) -> bool:
        """A tensor keeps the same positions along one axis wherever it is on the others."""
        changed = False
        for grid in self.grids:
            alive = self._alive(grid)
            full = np.ones((), dtype=bool)
            for axis in range(grid.ndim):
                others = tuple(d for d in range(grid.ndim) if d != axis)
                full = full & alive.any(axis=others, keepdims=True)
            missing = grid[full & ~alive]
            if len(missing):
                reason = "others at the same position of the split axis stay"
                changed |= self._give_back(np.unique(missing).tolist(), "product", reason)
        return changed

    def _nothing_empty(self) -> bool:
        changed = False
        for roots in self.axes:
            if roots.size and not self._alive(roots).any():
                first = roots.reshape(len(roots), -1)[:, 0] if roots.ndim > 1 else roots[:1]
                changed |= self._give_back(
                    first.tolist(), "last", "every channel is dead, and a layer needs at least one"
                )
        return changed

    def _balance(self) -> bool:
        """Equal parts of an axis keep equally many positions."""
        changed = False
        for parts, where in self.balanced:
            most = max(part.kept(self.removed) for part in parts)
            for part in parts:
                if part.kept(self.removed) < most:
                    changed |= self._grow(part, most, f"{where} takes equal parts")
        return changed

    def _widths(self) -> bool:
        if self.multiple == 1:
            return False
        changed, inner = False, np.zeros_like(self.removed)  # inner: channels of narrower sets, rounded before
        for own in self.widths:
            gone = own[self.removed[own]]
            gone = gone[np.argsort(inner[gone], kind="stable")]
            back = gone[: -(len(own) - len(gone)) % self.multiple].tolist()
            changed |= self._give_back(back, "aligned", f"the kept width is a multiple of {self.multiple}")
            inner[own] = True
        return changed

    def _constants(self) -> bool:
        """Where constants cannot go into a bias, one channel that holds one must stay to carry them."""
        wanting: list[tuple[Read, np.ndarray, np.ndarray]] = []
        for read, roots in self.reads:
            gone, keeps = self._carried(read, roots)
            for segment in np.flatnonzero(gone.any(axis=1) & ~keeps.any(axis=1)).tolist():
                columns = np.flatnonzero(gone[segment])
                wanting.append(
                    (read, roots.reshape(read.groups, -1)[segment, columns], self._values(read)[segment, columns])
                )
        if not wanting:
            return False
        asked: dict[int, int] = {}
        for _, roots, _ in wanting:
            for root in roots.tolist():
                asked[root] = asked.get(root, 0) + 1
        changed = False
        for read, roots, values in wanting:
            if not self._alive(roots).any():
                large = np.abs(values) >= _LEAST_CARRIER * np.abs(values).max()
                best = max(range(len(roots)), key=lambda i: (large[i], asked[int(roots[i])], abs(values[i])))
                others = len(roots) - 1
                kind: Kind = "carrier"
                reason = f"carries the constants of {others} others through layer {read.layer!r}"
                if not others:
                    kind, reason = "leak", f"constant {values[best]:.3g} {stuck(read)}"
                changed |= self._give_back([int(roots[best])], kind, reason)
        return changed

    def _stuck(self) -> bool:
        """Where a layer can neither fold nor carry constants, its rows that stay need them, needed or not."""
        changed = False
        for read, columns, rows in self.fixed_reads:
            if not (self._alive(rows) & ~read.silent_rows.numpy()).any():
                continue
            gone = ~self._alive(columns) & (np.nan_to_num(read.constant.numpy()) != 0) & ~read.ignored.numpy()
            changed |= self._give_back(np.unique(columns[gone]).tolist(), "leak", f"its constant {stuck(read)}")
        return changed

    def _values(self, read: Read) -> np.ndarray:
        return read.constant.numpy().reshape(read.groups, -1)

    def _carried(self, read: Read, roots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Columns that go with a constant the layer uses, and columns that stay and hold one, ``[groups, ci]``."""
        value = np.nan_to_num(read.constant.numpy())
        alive = self._alive(roots)
        gone = (~alive & (value != 0) & ~read.ignored.numpy()).reshape(read.groups, -1)
        size = np.abs(value).reshape(read.groups, -1)
        # A tiny constant would need huge weights to stand for the others.
        least = _LEAST_CARRIER * np.where(gone, size, 0).max(axis=1, keepdims=True)
        keeps = alive.reshape(read.groups, -1) & (size > 0) & (size >= least)
        return gone, keeps

    def _carriers(self) -> list[tuple[Read, dict[int, list[int]]]]:
        found = []
        for read, roots in self.reads:
            gone, keeps = self._carried(read, roots)
            width, taken = gone.shape[1], {}
            for segment in np.flatnonzero(gone.any(axis=1)).tolist():
                value = np.abs(np.where(keeps[segment], self._values(read)[segment], 0))
                taken[segment * width + int(value.argmax())] = (
                    segment * width + np.flatnonzero(gone[segment])
                ).tolist()
            if taken:
                found.append((read, taken))
        return found

    def _setting(self, setting: Setting) -> int:
        value = getattr(self.ledger.module.get_submodule(setting.module), setting.name)
        return int(value if setting.index is None else value[setting.index])

    def _settings(self) -> dict[Setting, int]:
        """The largest number that any of its uses asks for; the others then keep more."""
        found: dict[Setting, int] = {}
        for equation in self.equations:
            if isinstance(equation.expr, Setting):
                kept = equation.positions.kept(self.removed)
                found[equation.expr] = max(kept, found.get(equation.expr, 0))
        asked: dict[Setting, int] = {}
        for equation in self.equations:
            solution = _solved(equation.expr, equation.positions.kept(self.removed), found, self.dense)
            if solution is not None and solution[0] not in found:
                asked[solution[0]] = max(solution[1], asked.get(solution[0], 0))
        return found | asked

    def _sizes(self) -> bool:
        changed, settings = False, self._settings()

        def value_of(leaf: Extent | Setting) -> int:
            if isinstance(leaf, Extent):
                return self.extents.size(leaf.node, leaf.dim, self.removed)
            return settings.get(leaf, self.dense.get(leaf, 0))

        for equation in self.equations:
            stated, kept = evaluate(equation.expr, value_of), equation.positions.kept(self.removed)
            if stated == kept:
                continue
            reason = f"the size is stated by {equation.where}"
            if kept < stated:
                done = self._grow(equation.positions, stated, reason)
            else:
                done = self._raise(equation.expr, kept, value_of, reason)
            changed |= done or self._keep_all(equation, reason)
        return changed

    def _grow(self, positions: Positions, count: int, reason: str) -> bool:
        """Give whole positions back, the first ones, until ``count`` stay."""
        dead = np.flatnonzero(~positions.alive(self.removed))
        chosen = dead[: max(0, count - positions.kept(self.removed))]
        return self._give_back(np.unique(positions.roots[chosen]).tolist(), "size", reason)

    def _raise(self, expr: Expr, wanted: int, value_of: Callable[[Extent | Setting], int], reason: str) -> bool:
        """Give back so that ``expr`` grows to ``wanted``."""
        if isinstance(expr, Extent):
            found = self.extents.positions(expr.node, expr.dim)
            return isinstance(found, Positions) and self._grow(found, wanted, reason)
        if not isinstance(expr, Derived):
            return False
        left, right = evaluate(expr.left, value_of), evaluate(expr.right, value_of)
        if expr.operation == "//" and right:
            return self._raise(expr.left, wanted * right, value_of, reason)
        if expr.operation == "*" and left and right:
            return self._raise(expr.left, -(-wanted // right), value_of, reason) or self._raise(
                expr.right, -(-wanted // left), value_of, reason
            )
        if expr.operation in "+-":
            back = right if expr.operation == "+" else -right
            return self._raise(expr.left, wanted - back, value_of, reason)
        return False

    def _keep_all(self, equation: Equation, reason: str) -> bool:
        """Nothing clever: everything this size depends on stays."""
        changed = self._grow(equation.positions, len(equation.positions.roots), reason)
        for leaf in leaves(equation.expr):
            if isinstance(leaf, Extent):
                found = self.extents.positions(leaf.node, leaf.dim)
                if isinstance(found, Positions):
                    changed |= self._grow(found, len(found.roots), reason)
            else:
                for other in self.equations:
                    if leaf == other.expr:
                        changed |= self._grow(other.positions, len(other.positions.roots), reason)
        return changed


def _solved(
    expr: Expr, wanted: int, known: Mapping[Setting, int], dense: Mapping[Setting, int]
) -> tuple[Setting, int] | None:
    """The one unknown attribute among numbers, and the least value that gives ``wanted``."""
    if isinstance(expr, Setting):
        return None if expr in known else (expr, wanted)
    if not isinstance(expr, Derived):
        return None
    left, right = (_number(side, known) for side in (expr.left, expr.right))
    if right is None and expr.operation != "*" and isinstance(expr.right, Setting):
        right = dense.get(expr.right)  # as in width // parts: the width is what changes
    if expr.operation == "*" and left:
        return _solved(expr.right, -(-wanted // left), known, dense)
    if expr.operation == "*" and right:
        return _solved(expr.left, -(-wanted // right), known, dense)
    if expr.operation == "//" and right:
        return _solved(expr.left, wanted * right, known, dense)
    if expr.operation == "+" and right is not None:
        return _solved(expr.left, wanted - right, known, dense)
    if expr.operation == "-" and right is not None:
        return _solved(expr.left, wanted + right, known, dense)
    return None


def _number(expr: Expr, known: Mapping[Setting, int]) -> int | None:
    if isinstance(expr, int):
        return expr
    return known.get(expr) if isinstance(expr, Setting) else None
