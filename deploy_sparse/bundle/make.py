"""What ships an engine: verified first, then written in the form that the receiver takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from ..engine.entry import Engine, open_entry
from ..errors import ConfigError, EngineError, nearest
from .sealed import seal
from .triton import place_model, served_by

Format = Literal["triton", "zip"]


@dataclass(frozen=True)
class Bundled:
    """A bundle that was written.

    Attributes:
        path: the zip file, or the model's folder in the Triton repository.
        format: which of the two.
        notes: what the receiver has to know.
    """

    path: Path
    format: Format
    notes: tuple[str, ...] = ()


def bundle_engine(
    engine: str | Path | Engine,
    *,
    format: Format,
    out: str | Path,
    name: str | None = None,
    labels: Sequence[str] | None = None,
    sample: Mapping[str, np.ndarray] | None = None,
    tolerance: float | None = None,
) -> Bundled:
    """Bundle an engine for another machine. Every hash of the engine is checked first; nothing is overwritten.

    Args:
        engine: the engine's folder, a file in it, or what :func:`deploy_sparse.build_engine` returned.
        format: ``"triton"``: a model in a Triton Inference Server repository; ``"zip"``: one file with the ONNX graph,
            the target, the manifest and a parity sample, which :func:`open_bundle` rebuilds and proves.
        out: the repository's folder, or the zip file.
        name: of the Triton model; the engine's by default.
        labels: for Triton: names of the classes, in the order of the first output's last axis.
        sample: for zip: inputs of the parity sample; seeded ones by default.
        tolerance: for zip: the largest difference, of the largest output, with which a rebuilt engine passes.

    Raises:
        ConfigError: an unknown format, or an option that goes with the other one.
        ArtifactError: the engine is missing or damaged, or ``out`` exists with other content or cannot be written.
        EngineError: an engine that the format does not take; the message says what to build instead.
    """
    if format not in get_args(Format):
        known = get_args(Format)
        raise ConfigError(
            f"unknown format {format!r}",
            expected=f"one of {', '.join(known)}",
            fix=f"{nearest(str(format), known)}triton: a model repository; zip: one file that rebuilds elsewhere",
        )
    of_other = {"name": name, "labels": labels} if format == "zip" else {"sample": sample, "tolerance": tolerance}
    for option, value in of_other.items():
        if value is not None:
            raise ConfigError(
                f"{option} with format {format!r}",
                expected=f"{option} with the other format only",
                fix=f"leave {option} out" + ("; an engine is named when it is built" if option == "name" else ""),
            )
    if not isinstance(engine, str | Path | Engine):
        raise EngineError(
            f"a {type(engine).__name__} was given",
            expected="the folder of an engine, or what build_engine returned",
            fix="build one first: deploy_sparse.build_engine(…)",
        )
    found = open_entry(engine.folder if isinstance(engine, Engine) else engine)
    if format == "zip":
        path = Path(out)
        if path.suffix != ".zip":
            raise ConfigError(f"out is {str(out)!r}", expected="a file ending in .zip", fix=f"take {path.name}.zip")
        seal(found, path, sample, tolerance)
        return Bundled(path, format)
    model = name or str(found.manifest["name"])
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", model):
        raise ConfigError(
            f"model name {model!r}",
            expected="up to 64 letters, digits, dots, dashes and underscores, not starting with a dot",
            fix="choose a plain name, for example resnet18",
        )
    return Bundled(place_model(found, Path(out), model, labels), format, served_by(found))
