"""The engines of one network of a suite; what is made and exported once is shared by its targets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engine.build import build_engine
from ..engine.entry import Engine
from ..engine.onnx.export import export_onnx
from ..engine.onnx.file import OnnxFile
from ..engine.target import Target
from ..errors import ConfigError
from ..measure.profile import Facts
from .config import DENSE, Suite
from .forms import Made, Maker
from .state import SubjectFacts


@dataclass(frozen=True)
class Built:
    """A subject that can be timed, and what is known of it."""

    engine: Engine
    made: Made
    facts: Facts


@dataclass
class Builder:
    """Builds subjects in a scratch folder.

    Attributes:
        suite: which forms there are.
        maker: of the network.
        scratch: for ONNX files and engines.
    """

    suite: Suite
    maker: Maker
    scratch: Path
    made: dict[tuple[Any, ...], Made] = field(default_factory=dict)
    files: dict[int, OnnxFile] = field(default_factory=dict)

    def build(self, subject: str, target: Target) -> Built:
        """Make, export and compile one subject.

        Raises:
            ConfigError: an engine in a folder is for another target; and what the steps raise.
        """
        made = self._made(subject, target)
        return Built(self._engine(subject, made, target), made, self.facts(subject, made, target))

    def facts(self, subject: str, made: Made | None, target: Target) -> Facts:
        """What a record says of a subject besides its times; of one that was not made, what it was to be."""
        form = self.suite.forms.get(subject)
        dense = self._made(DENSE, target) if made is not None else None
        gone = None
        if made is not None and dense is not None and made.parameters is not None and dense.parameters:
            gone = min(1.0, max(0.0, 1.0 - made.parameters / dense.parameters))
        return Facts(
            network=self.maker.network.name,
            form=DENSE if form is None else form.family(target.width_multiple),
            sparsity=gone,
            accuracy=made.accuracy if made else None,
            parameters=made.parameters if made else None,
            macs=made.macs if made else None,
            ticket=made.ticket if made else None,
        )

    def description(self, subject: str, made: Made, target: Target) -> SubjectFacts:
        """What the records do not say."""
        return SubjectFacts(
            network=self.maker.network.name,
            subject=subject,
            target=target.name,
            how=made.how,
            parity=made.parity,
            macs=made.macs,
            dense_macs=made.dense_macs,
            whole_macs=made.whole_macs,
        )

    def _made(self, subject: str, target: Target) -> Made:
        """Made once for all targets that want the same widths; a form chosen by timing for each."""
        form = self.suite.forms.get(subject)
        key: tuple[Any, ...] = (subject,)
        if form is not None and form.deployed == "auto":
            key = (subject, target.digest)
        elif form is not None and (form.multiple is None or form.structure == "blocks"):
            key = (subject, target.width_multiple)
        if key not in self.made:
            self.made[key] = self.maker.make(subject, form, target)
        return self.made[key]

    def _engine(self, subject: str, made: Made, target: Target) -> Engine:
        if made.engine is not None:
            if made.engine.target.digest != target.digest:
                raise ConfigError(
                    f"{made.engine.folder} is an engine for {made.engine.target.name}",
                    expected=f"an engine for {target.name}",
                    fix="name the ticket or compact network instead, which is built for every target",
                )
            return made.engine
        assert made.module is not None
        inputs = self.maker.inputs
        name = f"subject{[DENSE, *self.suite.forms].index(subject)}"
        if target.from_module:
            return build_engine(made.module, target, inputs, self.scratch / "engines", name=name)
        if id(made) not in self.files:
            self.files[id(made)] = export_onnx(made.module, inputs, self.scratch / "onnx" / f"{len(self.files)}.onnx")
        scaled = target.precision in ("int8", "fp8")  # their scales come from noise: fit for times, for nothing else
        data = [inputs[0].numpy()] * 8 if scaled else None
        return build_engine(self.files[id(made)], target, out=self.scratch / "engines", name=name, calibration=data)
