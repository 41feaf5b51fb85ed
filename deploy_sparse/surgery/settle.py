"""From what was learnt to a network that runs: choose, rehearse, give back what the code holds on to, and again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import SurgeryError
from ._axes import Ledger
from ._nodes import Node
from ._rehearse import Rehearsal, rehearse, rehearse_elsewhere
from ._sizes import Setup
from ._values import lean
from .assemble import Assembly, assemble
from .choose import Choice, choose, choose_alike
from .graph import held
from .narrow import narrowed
from .parts import GroupPlan
from .trace import place

_REHEARSALS = 25


@dataclass(frozen=True)
class Settled:
    """A choice that was rehearsed.

    Attributes:
        made: what the narrowed network is made of.
        groups: what stays in each group and why.
        shell: the narrowed network without memory.
        calls: what it ran.
    """

    made: Assembly
    groups: tuple[GroupPlan, ...]
    shell: nn.Module
    calls: tuple[Node, ...]


@dataclass(frozen=True)
class _Run:
    """One rehearsal, with what was learnt and chosen for its size."""

    ledger: Ledger
    choice: Choice
    rehearsal: Rehearsal
    alike: bool


@dataclass(frozen=True)
class Settler:
    """Everything a choice is tried on.

    Attributes:
        ledger: what was learnt at the example's size.
        setups: other sizes.
        tensors: dense tensors by name, masked.
        plain: the dense network without memory.
        inputs: the example's.
        multiple: of which kept widths are.
        attention: paths of attention that was opened for the trace.
        spread: let layers leave out rows of zeros that a shortcut asks for.
    """

    ledger: Ledger
    setups: tuple[Setup, ...]
    tensors: Mapping[str, torch.Tensor]
    plain: nn.Module
    inputs: tuple[Any, ...]
    multiple: int
    attention: tuple[str, ...]
    spread: bool

    def run(self) -> Settled:
        """Choose and rehearse until the network runs as predicted.

        Raises:
            SurgeryError: it does not, whatever stays.
        """
        problem = where = ""
        for _ in range(_REHEARSALS):
            choices = self._choices()
            made = assemble(self.ledger, choices[0], self.tensors, self.attention, spread=self.spread)
            if not made.shape.cuts:
                return Settled(made, choices[0].groups, self.plain, self.ledger.traced.calls)
            shell = narrowed(self.plain, replace(made.shape, attention=self.attention), made.shell)
            if self.ledger.traced.real:  # it looks at values, which the shell does not have; only the proof will tell
                return Settled(made, choices[0].groups, shell, self.ledger.traced.calls)
            runs = self._rehearsals(choices, made, shell)
            first = runs[0].rehearsal
            failed = next((run for run in runs if run.rehearsal.wrong is not None), None)
            if failed is not None and failed.rehearsal.wrong is not None:
                problem, where = failed.rehearsal.problem, place(failed.rehearsal.wrong)
                idle = "" if failed.rehearsal.wrong in failed.ledger.values else ", though nothing reads its result"
                if not _keep_near(failed, f"{where} needs this size{idle}: {problem}"):
                    break
            elif all(run.alike or set(run.rehearsal.rescales) == set(first.rescales) for run in runs):
                return Settled(replace(made, rescales=first.rescales), choices[0].groups, shell, first.calls)
            else:  # other rows would have to make up for the width than at the example's size
                for weight in {rescale.weight for run in runs for rescale in run.rehearsal.rescales}:
                    why = f"{weight!r} feeds code whose numbers depend on the width and on the size of the input"
                    self.ledger.atoms.pin(self.ledger.axes[weight, 0].atoms, why)
        raise SurgeryError(
            f"the narrowed network does not run: {problem} ({where})",
            expected="a network whose forward() takes its sizes from its tensors and layers",
            fix="replace numbers written into forward() by x.shape or -1",
        )

    def _others(self) -> list[tuple[Setup, Ledger]]:
        """Sizes at which other operations run."""
        return [(setup, setup.ledger) for setup in self.setups if setup.ledger is not None and not setup.alike]

    def _choices(self) -> list[Choice]:
        others = [ledger for _, ledger in self._others()]
        if not others:
            return [choose(self.ledger, self.multiple)]
        return choose_alike([self.ledger, *others], self.multiple)

    def _rehearsals(self, choices: list[Choice], made: Assembly, shell: nn.Module) -> list[_Run]:
        """At the example's size; if that goes well, at the others too."""
        replaced = [norm.module for norm in made.shape.norms] + [part.module for part in made.shape.spreads]
        first = rehearse(self.ledger, choices[0].removed, shell, self.inputs, replaced)
        runs = [_Run(self.ledger, choices[0], first, True)]
        if first.wrong is not None:
            return runs
        for (setup, ledger), choice in zip(self._others(), choices[1:], strict=True):
            runs.append(_Run(ledger, choice, rehearse(ledger, choice.removed, shell, setup.inputs, replaced), False))
        for setup in self.setups:
            if setup.alike:
                run = rehearse_elsewhere(first, self.ledger, setup.traced, shell, setup.inputs, replaced)
                runs.append(_Run(self.ledger, choices[0], run, True))
        return runs


def _keep_near(run: _Run, why: str) -> bool:
    """Make the channels of the nearest tensors before the wrong operation stay of which any went; False for none."""
    ledger, node = run.ledger, run.rehearsal.wrong
    assert node is not None
    removed = torch.from_numpy(np.asarray(run.choice.removed))
    near, seen = [node, *node.all_input_nodes] if run.rehearsal.ran else list(node.all_input_nodes), set[Node]()
    while near:
        values = [value for source in near if source in ledger.values for value in held(ledger, source)]
        roots = [ledger.atoms.roots(lean(value.atoms)).reshape(-1) for value in values]
        gone = any(bool(removed[r[r >= 0]].any()) for r in roots)
        for value in values:
            ledger.pin(value, why)
        if gone:
            return True
        seen.update(near)
        near = [source for known in near for source in known.all_input_nodes if source not in seen]
    return False
