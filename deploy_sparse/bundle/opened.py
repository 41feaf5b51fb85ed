"""A bundle that arrived: verified before anything of it is used, rebuilt, and proved on its parity sample."""

from __future__ import annotations

import json
import shutil
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artifact import FORMAT_VERSION, digest_of
from ..config import config_from
from ..engine.build import build_engine
from ..engine.entry import KIND as ENGINE
from ..engine.entry import ONNX_FILE, PLAN_FILE, Engine
from ..engine.runner import load_engine
from ..engine.target import Target, in_precision, load_target
from ..engine.tensors import TensorSpec, spec_from_json
from ..errors import ArtifactError, BuildError, ConfigError, EngineError
from .archive import Archive, open_archive, refusal
from .graph import run_graph
from .sample import Sample, difference, read_sample, resized, tolerance_of
from .sealed import KIND, OWN_FILES, SAMPLE_FILE, SIDECAR, TARGET_FILE

REMAKE = "deploy-sparse bundle ENGINE --format zip"
MOST_JSON = 64 << 20
"""Bytes that a bundle's own description may have."""


@dataclass(frozen=True)
class Proof:
    """That something computes what the parity sample says.

    Attributes:
        subject: what was run: the rebuilt engine, or the ONNX graph on the CPU.
        max_abs, max_rel, top1: how far it is from the sample; see :class:`Difference`.
        tolerance: the largest ``max_rel`` that passes.
        rows: batch size it was run with.
        why_graph: why the graph was run and not the engine; None where the engine was.
    """

    subject: str
    max_abs: float
    max_rel: float
    top1: float
    tolerance: float
    rows: int
    why_graph: str | None = None

    def __str__(self) -> str:
        text = (
            f"{self.subject} computes the parity sample: max|Δ| {self.max_abs:.3g}, {self.max_rel:.3g} of the largest "
        )
        text += f"output (at most {self.tolerance:g}), top-1 agreement {self.top1:.1%} of {self.rows}"
        return f"{text}; the engine itself was not run: {self.why_graph}" if self.why_graph else text


@dataclass(frozen=True)
class Rebuilt:
    """A bundle's engine, built again here, and the proof that it computes the same."""

    engine: Engine
    proof: Proof


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every byte was verified.

    Attributes:
        path: the zip file.
        name: of the engine.
        digest: names the bundle's content.
        manifest: of the engine that was bundled, as it was on the machine that built it.
        target: what that was built for.
        files: size and SHA-256 of every member but the description itself.
        tolerance: the largest difference, of the largest output, that passes.
    """

    path: Path
    name: str
    digest: str
    manifest: Mapping[str, Any] = field(repr=False)
    target: Target
    files: Mapping[str, Mapping[str, Any]] = field(repr=False)
    tolerance: float

    def verify(self) -> Proof:
        """Run the ONNX graph on the parity sample, in ONNX Runtime on this machine's CPU; nothing is built.

        Raises:
            ArtifactError: the file changed since it was opened. BuildError: ONNX Runtime does not take the graph.
            EngineError: the outputs are others.
        """
        with tempfile.TemporaryDirectory(prefix="deploy-sparse-") as scratch:
            folder, sample = self._unpack(Path(scratch))
            with self._named(folder):
                return self._prove_graph(folder, sample, None)

    def rebuild(
        self,
        out: str | Path = "engines/out",
        *,
        target: str | Path | Target | None = None,
        name: str | None = None,
        calibration: Any = None,
    ) -> Rebuilt:
        """Build the engine again and run it on the parity sample.

        Where the engine does not run on this machine, its ONNX graph is run on the CPU instead, and the proof says so.

        Args:
            out: folder for engines.
            target: what to build for; by default the bundle's own target. A bundle in a lower precision keeps that,
                as no other can be made of its graph.
            name: first part of the engine's folder name; by default the bundle's.
            calibration: real inputs, for a target in a lower precision than the bundle's graph; as for
                :func:`deploy_sparse.build_engine`.

        Raises:
            ArtifactError: the file changed since it was opened, or a folder cannot be written.
            ConfigError: an unknown target, or one whose ranges leave the sample out.
            MissingDependencyError, BuildError: as for :func:`deploy_sparse.build_engine`.
            EngineError: the outputs are others; the engine that was built is removed.
        """
        wanted = self.target if target is None else self._in_own_precision(load_target(target))
        with tempfile.TemporaryDirectory(prefix="deploy-sparse-") as scratch:
            folder, sample = self._unpack(Path(scratch))
            _check_axes(wanted, self._specs("inputs"), sample)
            with self._named(folder):
                engine = build_engine(
                    folder / ONNX_FILE, wanted, out=out, name=name or self.name, calibration=calibration
                )
            try:
                self._check_tensors(engine)
                why = engine.runnable()
                if engine.target.version_compatible:
                    why = "it holds host code, which only load_engine(path, allow_host_code=True) runs"
                with self._named(folder):
                    proof = self._prove_graph(folder, sample, why) if why else self._prove_engine(engine, sample)
            except BaseException:
                if not engine.cached:
                    shutil.rmtree(engine.folder, ignore_errors=True)
                raise
        return Rebuilt(engine, proof)

    def _in_own_precision(self, target: Target) -> Target:
        own = self.target
        if own.precision == "fp32" or target.precision != "fp32" or target.from_module:
            return target
        return in_precision(target, own.precision, own.exclude)

    def _unpack(self, folder: Path) -> tuple[Path, Sample]:
        """Copy everything to an empty folder; the hashes are those of the bytes that are written."""
        with open_archive(self.path) as archive:
            _check_names(archive, self.files)
            for name, entry in self.files.items():
                with open(folder / name, "xb") as stream:
                    archive.copy(name, entry, stream)
        data = (folder / SAMPLE_FILE).read_bytes()
        return folder, read_sample(self.path, data, self._specs("inputs"), self._specs("outputs"))

    @contextmanager
    def _named(self, folder: Path) -> Iterator[None]:
        """Errors of what was unpacked to ``folder``, which is gone when they are read, name the bundle instead."""
        try:
            yield
        except (ArtifactError, BuildError, EngineError) as problem:
            given = problem.given.replace(f"{folder}/", f"{self.path}: ")
            if given == problem.given:
                raise
            fix = f"make the bundle again from a sound engine: {REMAKE}"
            raise type(problem)(given, expected=problem.expected, fix=fix) from problem

    def _specs(self, kind: str) -> tuple[TensorSpec, ...]:
        return tuple(spec_from_json(entry) for entry in self.manifest[kind])

    def _check_tensors(self, engine: Engine) -> None:
        """The graph has the inputs and outputs that the sample is of."""
        for kind, found in (("inputs", engine.inputs), ("outputs", engine.outputs)):
            if [(spec.name, len(spec.shape)) for spec in found] != [
                (spec.name, len(spec.shape)) for spec in self._specs(kind)
            ]:
                raise refusal(self.path, f"its graph has other {kind} than it says")

    def _prove_graph(self, folder: Path, sample: Sample, why: str | None) -> Proof:
        outputs = run_graph(folder / ONNX_FILE, sample.inputs)
        return self._judge("the ONNX graph on this CPU", outputs, sample, self.tolerance, why)

    def _prove_engine(self, engine: Engine, sample: Sample) -> Proof:
        smallest, largest = engine.batch_range
        rows = min(max(_rows(sample, engine.inputs), smallest), largest)
        inputs = resized(sample.inputs, engine.inputs, rows)
        feeds = {spec.name: inputs[spec.name].astype(spec.dtype, copy=False) for spec in engine.inputs}
        with load_engine(engine) as runner:
            outputs = runner.run(feeds)
        expected = Sample(inputs, resized(sample.outputs, engine.outputs, rows))
        bound = max(self.tolerance, tolerance_of(engine.manifest["precision"]))
        return self._judge(f"the engine for {engine.target.name}", outputs, expected, bound, None)

    def _judge(
        self, subject: str, outputs: Mapping[str, Any], expected: Sample, tolerance: float, why: str | None
    ) -> Proof:
        found = difference(outputs, expected.outputs)
        rows = _rows(expected, self._specs("inputs"))
        if not found.max_rel <= tolerance:
            raise EngineError(
                f"{subject} differs from the parity sample by {found.max_rel:.3g} of the largest output",
                expected=f"at most {tolerance:g}",
                fix="build for another target or precision; where the difference is meant, bundle the engine again "
                "with tolerance=…",
            )
        return Proof(subject, found.max_abs, found.max_rel, found.top1, tolerance, rows, why)


def open_bundle(path: str | Path) -> Bundle:
    """Open a bundle: every hash is checked, and nothing is written or built.

    Raises:
        ArtifactError: missing, truncated or altered, by another version, or with members that no bundle has.
    """
    path = Path(path)
    with open_archive(path) as archive:
        body = _description(path, archive.read(SIDECAR, MOST_JSON))
        try:
            _check_names(archive, body["files"])
            for name, entry in body["files"].items():
                archive.copy(name, entry)
            manifest = body[ENGINE]
            target = _told_twice(archive, config_from(Target, manifest["target"], source=TARGET_FILE))
            bundle = Bundle(
                path=path,
                name=body["name"],
                digest=str(body["digest"]),
                manifest=manifest,
                target=target,
                files=body["files"],
                tolerance=float(body["tolerance"]),
            )
            _check_facts(bundle)
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise refusal(path, f"its {SIDECAR} lacks something ({problem!r})") from None
        except ConfigError as problem:
            raise refusal(path, f"its target is of another version of this toolkit ({problem.given})") from None
    return bundle


def _description(path: Path, data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data)
        digest = body.pop("digest")
        sound = digest_of(body) == digest and body["kind"] == KIND
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        sound = False
    if not sound:
        raise refusal(path, f"its {SIDECAR} is damaged")
    if body.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {body.get('format_version')}",
            expected=f"format version {FORMAT_VERSION}",
            fix=f"make it again with this version: {REMAKE}",
        )
    return {**body, "digest": digest}


def _told_twice(archive: Archive, target: Target) -> Target:
    """The target, which the manifest and a file for people tell alike."""
    text = archive.read(TARGET_FILE, MOST_JSON)
    try:
        told = config_from(Target, tomllib.loads(text.decode()), source=TARGET_FILE)
    except (ValueError, RecursionError) as problem:  # no TOML, or no text
        raise refusal(archive.where, f"its {TARGET_FILE} is no TOML ({problem})") from None
    if told != target:
        raise refusal(archive.where, f"its {TARGET_FILE} is another target than the one in {SIDECAR}")
    return target


def _check_names(archive: Archive, files: Mapping[str, Any]) -> None:
    """The members are exactly those that the description lists, and the ones that every bundle has."""
    listed = {*files, SIDECAR}
    for name in sorted({*archive.sizes} ^ listed):
        has = name in archive.sizes
        raise refusal(archive.where, f"it has {name!r}, which it does not list" if has else f"its {name!r} is missing")
    for name in (ONNX_FILE, TARGET_FILE, SAMPLE_FILE):
        if name not in listed:
            raise refusal(archive.where, f"it has no {name}")


def _check_facts(bundle: Bundle) -> None:
    """TypeError, KeyError or ValueError where something is not as a bundle has it.

    Raises:
        ArtifactError: its files are not those of the engine that it describes.
    """
    held = {name: entry["sha256"] for name, entry in bundle.manifest["files"].items() if name != PLAN_FILE}
    listed = {name: entry["sha256"] for name, entry in bundle.files.items() if name not in OWN_FILES}
    for name in sorted({*held} | {*listed}):
        if held.get(name) != listed.get(name):
            raise refusal(bundle.path, f"its {name!r} is not of the engine that its {SIDECAR} describes")
    extents = [extent for kind in ("inputs", "outputs") for spec in bundle._specs(kind) for extent in spec.shape]
    if not all(isinstance(extent, int | str) for extent in extents):
        raise TypeError("a shape of other things than extents and names")
    if not bundle._specs("outputs"):
        raise ValueError("no outputs, so that there is nothing to prove")
    if not 0 <= bundle.tolerance < 1:
        raise ValueError(f"tolerance {bundle.tolerance}")
    _ = ("".join([bundle.name]), " ".join(bundle.manifest["runtime"].values()), bundle.manifest["runtime"]["name"])


def _check_axes(target: Target, inputs: Sequence[TensorSpec], sample: Sample) -> None:
    for spec in inputs:
        for axis, name in spec.axes.items():
            extent = sample.inputs[spec.name].shape[axis]
            if name in target.axes and not target.axes[name].min <= extent <= target.axes[name].max:
                raise ConfigError(
                    f"target {target.name!r} takes {target.axes[name].min} to {target.axes[name].max} for {name}, and "
                    f"the parity sample has {extent}",
                    expected="a range that holds the sample, by which the engine is proved",
                    fix=f"widen axes.{name} of the target, or bundle the engine again with another sample",
                )


def _rows(sample: Sample, inputs: Sequence[TensorSpec]) -> int:
    batched = [spec for spec in inputs if spec.batched] or [spec for spec in inputs if spec.shape]
    return sample.inputs[batched[0].name].shape[0] if batched else 1
