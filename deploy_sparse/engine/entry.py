"""An engine on disk: a verified folder with the ONNX graph, the compiled file and a manifest."""

from __future__ import annotations

import contextlib
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact import read_artifact, sha256_bytes
from ..config import config_from
from ..errors import ArtifactError, ConfigError
from .target import Target, in_precision, load_target
from .tensors import TensorSpec, spec_from_json

if TYPE_CHECKING:
    from .runner import Runner

KIND = "engine"
ONNX_FILE = "model.onnx"
PLAN_FILE = "model.engine"
PROGRAM_FILE = "model.pt2"
OWN_FILES = frozenset({f"{KIND}.json", ONNX_FILE, f"{ONNX_FILE}.json", PLAN_FILE, PROGRAM_FILE})
"""All files that an entry can have, but those of weights, whose names ``model.onnx`` knows."""
ENTRY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*-[0-9a-f]{12}")
REMAKE = "deploy-sparse build SUBJECT --target NAME"


@dataclass(frozen=True)
class Engine:
    """A built engine. Values come from the verified manifest; opening it is :meth:`open`.

    Attributes:
        folder: the entry: ``model.onnx`` (and files of its weights where it does not hold them itself),
            ``model.engine`` (TensorRT flavours) and ``engine.json``; for torch ``model.pt2`` and ``engine.json``.
        manifest: content of ``engine.json``.
        target: what it was built for.
        cached: whether :func:`build_engine` found it instead of building it.
    """

    folder: Path
    manifest: dict[str, Any] = field(repr=False)
    target: Target
    cached: bool = False

    @property
    def path(self) -> Path:
        """The file that runs: ``model.onnx`` in ONNX Runtime, ``model.engine`` in TensorRT, ``model.pt2`` in torch."""
        return self.folder / str(self.manifest["engine_file"])

    @property
    def bytes(self) -> int:
        """Size of what runs: of :attr:`path`, and of the files of its weights."""
        held = (self.path.name, *(self.weights if self.path.name == ONNX_FILE else ()))
        return sum(int(self.manifest["files"][name]["bytes"]) for name in held)

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the files beside ``model.onnx`` that hold weights of it; none for most."""
        return tuple(self.manifest.get("weights", ()))

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Names, types and shapes of the inputs."""
        return tuple(spec_from_json(entry) for entry in self.manifest["inputs"])

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Names, types and shapes of the outputs."""
        return tuple(spec_from_json(entry) for entry in self.manifest["outputs"])

    @property
    def batch_range(self) -> tuple[int, int]:
        """Smallest and largest batch."""
        return self.manifest["batch"]["min"], self.manifest["batch"]["max"]

    @property
    def axes(self) -> dict[str, dict[str, int]]:
        """Smallest, tuned-for and largest extents (``min``, ``opt``, ``max``) of other dynamic axes, by name."""
        return dict(self.manifest.get("axes", {}))

    def build_command(self, target: str | None = None) -> str:
        """The shell command that builds this engine's own ONNX file again, for its own target or another shipped one.

        Where its own target is not a shipped one, FILE stands for it in the command, and a note says what that is. A
        torch engine holds no ONNX file: SUBJECT stands for the network that it was built from.
        """
        notes, subject, lowered = [], str(self.folder / ONNX_FILE), self._lowered()
        if self.target.from_module:
            subject = "SUBJECT"
            notes.append("SUBJECT: the ticket or compact network that it was built from")
        name = target or self.target.name
        if name == self.target.name and not self._is(name):
            base = name.removesuffix(f"-{self.target.precision}")
            if lowered and self._is(base, *lowered):
                name = base
            else:
                notes.append(
                    f"FILE: a TOML file of target {name!r}, with the values that {KIND}.json has under 'target'"
                )
                name, lowered = "FILE", None
        elif name == self.target.name:
            lowered = None
        words = ["deploy-sparse", "build", subject, "--target", name]
        words += ["--out", str(self.folder.parent), "--name", str(self.manifest["name"])]
        if lowered is not None:  # the graph is: no other precision can be made of it
            words += ["--precision", lowered[0], *(("--exclude", *lowered[1]) if lowered[1] else ())]
        return shlex.join(words) + (f" ({'; '.join(notes)})" if notes else "")

    def _lowered(self) -> tuple[str, tuple[str, ...]] | None:
        """The precision of the engine's own ONNX file and the layers left out, where that is not fp32."""
        if self.target.from_module or self.target.precision == "fp32":
            return None
        return self.target.precision, self.target.exclude

    def _is(self, name: str, precision: str | None = None, exclude: tuple[str, ...] = ()) -> bool:
        """Whether the engine's target is the shipped one of this name, in that precision."""
        with contextlib.suppress(ConfigError):  # there may be none
            return in_precision(load_target(name), precision, exclude).digest == self.target.digest
        return False

    def runnable(self) -> str | None:
        """None when the engine can run on this machine, otherwise the reason why not."""
        from .fit import obstacle

        found = obstacle(self.manifest)
        if found is None:
            return None
        wanted = f", it needs {found.expected}" if found.reason != "no NVIDIA GPU" else ""
        return f"compiled, not timed here: {found.reason}{wanted}"

    def open(self, *, allow_host_code: bool = False, contexts: int = 1, cuda_graph: bool = False) -> Runner:
        """Verify the files and load the engine; see :func:`deploy_sparse.load_engine`."""
        from .runner import load_engine

        return load_engine(self, allow_host_code=allow_host_code, contexts=contexts, cuda_graph=cuda_graph)


def open_entry(path: str | Path, *, hashes: bool = True) -> Engine:
    """Verify the engine entry that ``path`` (its folder, or a file in it) names; every hash is checked.

    Args:
        hashes: False reads the manifest only and checks its digest and the sizes of files: for listing, never loading.

    Raises:
        ArtifactError: missing, another kind of artifact, truncated, altered, or by another version.
    """
    found = read_artifact(Path(path), KIND, remake=REMAKE, hashes=hashes)
    manifest = {**found.body, "digest": found.digest, "files": found.files}
    try:
        engine = Engine(found.folder, manifest, config_from(Target, manifest["target"], source=str(found.folder)))
        torch = engine.target.from_module
        if manifest["engine_file"] not in ((PROGRAM_FILE,) if torch else (ONNX_FILE, PLAN_FILE)):
            raise KeyError("engine_file")
        if not {manifest["engine_file"], PROGRAM_FILE if torch else ONNX_FILE} <= {*found.files}:
            raise KeyError("engine_file")
        _ = (engine.inputs, engine.outputs, engine.batch_range, manifest["runtime"]["name"])
        _ = (manifest["runtime"]["version"], manifest["compute_capabilities"], manifest["gpu"], manifest["key"])
        _ = manifest["name"]
    except (KeyError, TypeError, ConfigError) as problem:
        raise ArtifactError(
            f"{found.folder} is no usable engine ({str(problem).splitlines()[0]})",
            expected="an engine built by this version of the toolkit",
            fix=f"build it again: {REMAKE}",
        ) from problem
    return engine


def verified_bytes(engine: Engine, path: Path, *, during: str = "read") -> bytes:
    """The very bytes that the manifest lists: hashed after reading, so that a file swapped in between is not used.

    Args:
        engine: a verified entry.
        path: of one of its files.
        during: what is done with them, for the message.

    Raises:
        ArtifactError: the file changed since the entry was verified.
    """
    data = path.read_bytes()
    if sha256_bytes(data) != engine.manifest["files"][path.name]["sha256"]:
        raise ArtifactError(
            f"{path} changed while it was being {during}",
            expected="a file nobody else writes",
            fix=f"build it again: {engine.build_command()}",
        )
    return data
