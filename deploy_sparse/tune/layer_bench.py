"""Single layers timed on a target, packed against dense, in engines of their own; the times are kept in files."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..artifact import digest_of, environment, read_json, write_json
from ..engine.build import build_engine
from ..engine.onnx.file import OnnxFile
from ..engine.onnx.pieces import export_pieces
from ..engine.target import Target
from ..errors import ArtifactError, BuildError, EngineError, ExportError
from ..measure.profile import profile
from ..surgery.pack import TILE, LayerForm

VARIABLE = "DEPLOY_SPARSE_LAYER_TIMES"
_ANY = ("python", "onnx", "onnxscript")  # whose versions do not matter to a layer's time


def layer_times_folder() -> Path | None:
    """Where the times of layers are kept between calls: the folder that ``DEPLOY_SPARSE_LAYER_TIMES`` names, none where
    that is ``off``, and ``deploy-sparse/layer-times`` in the user's cache (``$XDG_CACHE_HOME`` or ``~/.cache``) without
    it."""
    given = os.environ.get(VARIABLE, "")
    if given:
        return None if given.lower() == "off" else Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # the specification has such a path ignored
        try:
            cache = Path.home() / ".cache"
        except RuntimeError:  # a user without a home
            return None
    return cache / "deploy-sparse" / "layer-times"


@dataclass(frozen=True)
class LayerBench:
    """Times layers, each kind once: those that differ in their numbers only take equally long.

    Attributes:
        target: where.
        batch: samples of a timed call.
        duration_s: timed seconds for each layer and form.
        cache: folder where times are kept under a hash of layer, target, batch, duration, this package's version and
            machine; None for none. One that cannot be written keeps nothing.
        poll: called between blocks; what it raises ends the timing.
    """

    target: Target
    batch: int
    duration_s: float
    cache: Path | None
    poll: Callable[[], None] = lambda: None
    known: dict[str, float | str] = field(default_factory=dict)

    def ratios(self, forms: Sequence[LayerForm]) -> list[float | str]:
        """Dense time over packed time of each layer, or why a layer has none: it does not export, compile or run."""
        keys = [self._key(form) for form in forms]
        for key in keys:
            if key not in self.known and (kept := self._kept(key)) is not None:
                self.known[key] = kept
        wanted = {key: form for key, form in zip(keys, forms, strict=True) if key not in self.known}
        for key, found in self._timed(wanted).items():
            self.known[key] = found
            if self.cache is not None and not isinstance(found, str):
                entry = {"ratio": found, "layer": wanted[key].description(), "target": self.target.name}
                with contextlib.suppress(ArtifactError):
                    write_json(self._file(key), entry)
        return [self.known[key] for key in keys]

    def _timed(self, forms: Mapping[str, LayerForm]) -> dict[str, float | str]:
        if not forms:
            return {}
        with tempfile.TemporaryDirectory(prefix="deploy-sparse-") as scratch:
            files, failed = self._files(forms, Path(scratch))
            found: dict[str, float | str] = dict(failed)
            for key in [key for key in forms if key not in failed]:
                self.poll()
                try:
                    engines = {
                        name: build_engine(*self._given(files, name, key, forms[key]), Path(scratch) / key, name=name)
                        for name in ("dense", "packed")
                    }
                    timed = profile(engines, "dense", batches=(self.batch,), duration_s=self.duration_s, poll=self.poll)
                    found[key] = timed.comparisons[0].ratio
                except (ExportError, BuildError, EngineError) as problem:
                    found[key] = problem.given
        return found

    def _given(
        self, files: Mapping[tuple[str, str], OnnxFile], name: str, key: str, form: LayerForm
    ) -> tuple[OnnxFile | nn.Module, Target, torch.Tensor | None]:
        """What an engine is built from: the layer itself where PyTorch runs it, else its file."""
        if not self.target.from_module:
            return files[name, key], self.target, None
        module = form.dense if name == "dense" else form.packed
        return module, self.target, torch.randn(2, *form.input_shape).to(form.dtype)

    def _files(
        self, forms: Mapping[str, LayerForm], scratch: Path
    ) -> tuple[dict[tuple[str, str], OnnxFile], dict[str, str]]:
        """ONNX files by kind and key, and why a layer has none: where they fail together each is tried alone."""
        self.poll()
        if self.target.from_module:
            return {}, {}
        try:
            return _exported(forms, scratch), {}
        except ExportError as problem:
            if len(forms) == 1:
                return {}, dict.fromkeys(forms, problem.given)
        files: dict[tuple[str, str], OnnxFile] = {}
        failed: dict[str, str] = {}
        for key, form in forms.items():
            found, why = self._files({key: form}, scratch / key)
            files |= found
            failed |= why
        return files, failed

    def _key(self, form: LayerForm) -> str:
        machine = {name: version for name, version in environment().items() if name not in _ANY}
        return digest_of(
            {
                "layer": form.description(),
                "target": self.target.digest,
                "batch": self.batch,
                "duration_s": self.duration_s,
                "tile": TILE,
                "machine": machine,  # and this package's version
                "gpu": torch.cuda.get_device_name() if self.target.on_gpu and torch.cuda.is_available() else None,
            }
        )[:24]

    def _file(self, key: str) -> Path:
        assert self.cache is not None
        return self.cache / f"{key}.json"

    def _kept(self, key: str) -> float | None:
        if self.cache is None:
            return None
        try:
            ratio = float(read_json(self._file(key))["ratio"])
        except (ArtifactError, KeyError, TypeError, ValueError):
            return None  # never timed, or damaged
        return ratio if math.isfinite(ratio) and ratio > 0 else None


def _exported(forms: Mapping[str, LayerForm], scratch: Path) -> dict[tuple[str, str], OnnxFile]:
    modules = {f"dense {key}": form.dense for key, form in forms.items()}
    modules |= {f"packed {key}": form.packed for key, form in forms.items()}
    read = {name: forms[name.split()[1]] for name in modules}
    inputs = {name: torch.randn(2, *form.input_shape).to(form.dtype) for name, form in read.items()}
    files = export_pieces(modules, inputs, scratch)
    return {(kind, key): file for name, file in files.items() for kind, key in [name.split()]}
