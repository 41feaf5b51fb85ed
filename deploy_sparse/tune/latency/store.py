"""Times of single layers, kept one file each as soon as they are known: a stopped table goes on where it was."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...artifact import digest_of, environment, read_json, write_json
from ...engine.target import Target
from ...errors import ArtifactError
from .bench import clock_of
from .shapes import LayerShape

_ANY = ("python", "onnx", "onnxscript")  # whose versions do not matter to a layer's time


@dataclass(frozen=True)
class PointStore:
    """Times by layer, under one setting.

    Attributes:
        folder: where files are kept; None, or one that cannot be written, keeps nothing beyond this object.
        setting: everything but the layer that a time depends on.
    """

    folder: Path | None
    setting: dict[str, Any]
    held: dict[LayerShape, float] = field(default_factory=dict)

    def get(self, shape: LayerShape) -> float | None:
        """Its time in ms, None where it was never timed or the file is damaged."""
        if shape not in self.held and (kept := self._read(shape)) is not None:
            self.held[shape] = kept
        return self.held.get(shape)

    def put(self, shape: LayerShape, ms: float) -> None:
        """Keep a time."""
        self.held[shape] = ms
        if self.folder is not None:
            with contextlib.suppress(ArtifactError):
                write_json(self._file(shape), {"ms": ms, "layer": shape.as_json(), "target": self.setting["name"]})

    def apart(self, name: str) -> PointStore:
        """A store for the same layers timed once more."""
        return PointStore(self.folder, {**self.setting, "apart": name})

    def _read(self, shape: LayerShape) -> float | None:
        if self.folder is None:
            return None
        try:
            entry = read_json(self._file(shape))
            ms = float(entry["ms"])
        except (ArtifactError, KeyError, TypeError, ValueError):
            return None
        return ms if math.isfinite(ms) and ms > 0 else None

    def _file(self, shape: LayerShape) -> Path:
        assert self.folder is not None
        key = digest_of({"layer": shape.as_json(), **self.setting})
        return self.folder / f"point-{key[:24]}.json"


def setting_of(target: Target, batch: int, rounds: int, pace: Sequence[LayerShape]) -> dict[str, Any]:
    """What a layer's time depends on besides the layer: target, batch, how and beside what it is timed, versions,
    machine."""
    machine = {name: version for name, version in environment().items() if name not in _ANY}
    gpu = torch.cuda.get_device_name() if target.on_gpu and torch.cuda.is_available() else None
    return {
        "name": target.name,
        "target": target.digest,
        "batch": batch,
        "rounds": rounds,
        "beside": [shape.as_json() for shape in pace],
        "clock": clock_of(target),
        "machine": machine,
        "gpu": gpu,
    }
