"""Single layers timed on a target, packed against dense, in engines of their own."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..artifact import digest_of, environment, read_json, write_json
from ..engine.build import build_engine
from ..engine.onnx_file import OnnxFile
from ..engine.pieces import export_pieces
from ..engine.target import Target
from ..errors import ArtifactError
from ..measure.profile import profile
from ..surgery.pack import LayerForm

_ANY = ("deploy-sparse", "python", "onnx", "onnxscript")  # whose versions do not matter to a layer's time


@dataclass(frozen=True)
class LayerBench:
    """Times layers, each kind once: those that differ in their numbers only take equally long.

    Attributes:
        target: where.
        batch: samples of a timed call.
        duration_s: timed seconds for each layer and form.
        cache: folder where times are kept under a hash of layer, target and machine; None for none.
    """

    target: Target
    batch: int
    duration_s: float
    cache: Path | None
    known: dict[str, float] = field(default_factory=dict)

    def ratios(self, forms: Sequence[LayerForm]) -> list[float]:
        """Dense time over packed time of each layer.

        Raises:
            ExportError, BuildError: a layer that does not export or compile.
        """
        keys = [self._key(form) for form in forms]
        for key in keys:
            if key not in self.known and (kept := self._kept(key)) is not None:
                self.known[key] = kept
        wanted = {key: form for key, form in zip(keys, forms, strict=True) if key not in self.known}
        for key, ratio in self._timed(wanted).items():
            self.known[key] = ratio
            if self.cache is not None:
                self.cache.mkdir(parents=True, exist_ok=True)
                found = {"ratio": ratio, "layer": wanted[key].description(), "target": self.target.name}
                write_json(self._file(key), found)
        return [self.known[key] for key in keys]

    def _timed(self, forms: dict[str, LayerForm]) -> dict[str, float]:
        if not forms:
            return {}
        found = {}
        with tempfile.TemporaryDirectory(prefix="deploy-sparse-") as scratch:
            files = self._files(forms, Path(scratch))
            for key in forms:
                engines = {
                    name: build_engine(files[name, key], self.target, out=Path(scratch) / key, name=name)
                    for name in ("dense", "packed")
                }
                timed = profile(engines, "dense", batches=(self.batch,), duration_s=self.duration_s)
                found[key] = timed.comparisons[0].ratio
        return found

    def _files(self, forms: dict[str, LayerForm], scratch: Path) -> dict[tuple[str, str], OnnxFile]:
        modules = {f"dense {key}": form.dense for key, form in forms.items()}
        modules |= {f"packed {key}": form.packed for key, form in forms.items()}
        read = {name: forms[name.split()[1]] for name in modules}
        inputs = {name: torch.randn(2, *form.input_shape).to(form.dtype) for name, form in read.items()}
        files = export_pieces(modules, inputs, scratch)
        return {(kind, key): file for name, file in files.items() for kind, key in [name.split()]}

    def _key(self, form: LayerForm) -> str:
        machine = {name: version for name, version in environment().items() if name not in _ANY}
        return digest_of(
            {"layer": form.description(), "target": self.target.digest, "batch": self.batch, "machine": machine}
        )[:24]

    def _file(self, key: str) -> Path:
        assert self.cache is not None
        return self.cache / f"{key}.json"

    def _kept(self, key: str) -> float | None:
        if self.cache is None or not self._file(key).is_file():
            return None
        try:
            return float(read_json(self._file(key))["ratio"])
        except (ArtifactError, KeyError, TypeError, ValueError):
            return None  # time it again
