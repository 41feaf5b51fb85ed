"""One zip file from which another machine rebuilds an engine and proves that it computes the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import FORMAT_VERSION, digest_of
from ..config import toml_text
from ..engine.entry import KIND as ENGINE
from ..engine.entry import ONNX_FILE, PLAN_FILE, Engine
from ..engine.target import RUNTIMES_OF, Target
from ..engine.tensors import check_feeds, sample_feeds
from ..errors import ConfigError, EngineError
from .archive import is_member_name, write_archive
from .graph import run_graph
from .placing import Content, content, place_file
from .sample import BATCH, Sample, check_sample, is_plain, tolerance_of

KIND = "bundle"
SIDECAR = f"{KIND}.json"
TARGET_FILE = "target.toml"
SAMPLE_FILE = "sample.npz"
README_FILE = "README.md"
OWN_FILES = frozenset({SIDECAR, TARGET_FILE, SAMPLE_FILE, README_FILE})


def seal(engine: Engine, path: Path, sample: Mapping[str, np.ndarray] | None, tolerance: float | None) -> None:
    """Write the bundle of a verified engine; the same engine gives the same bytes on one machine.

    Args:
        path: the zip file; its folder is created when missing.
        sample: inputs of the parity sample; seeded ones by default.
        tolerance: largest difference, of the largest output, with which another machine's engine passes; by default
            what the rounding of the engine's number formats explains.

    Raises:
        EngineError: an engine without an ONNX graph or one that ONNX Runtime does not run, or inputs it does not take.
        ConfigError: a tolerance that is none. ArtifactError: the file exists with other content, or a file of the
            engine changed meanwhile.
    """
    held = engine.manifest["files"]
    if ONNX_FILE not in held:
        raise EngineError(
            f"{engine.folder} holds no ONNX graph, as its runtime is {engine.target.runtime}",
            expected="an engine that another machine can rebuild from its ONNX graph",
            fix="build the network for cpu or a TensorRT target, and bundle that",
        )
    bound = tolerance_of(engine.manifest["precision"]) if tolerance is None else tolerance
    if not (isinstance(bound, int | float) and 0 <= bound < 1):
        raise ConfigError(
            f"tolerance {tolerance!r}", expected="a number in [0, 1): a share of the largest output", fix="take 1e-3"
        )
    members = {
        name: Content(engine.folder / name, entry["bytes"], entry["sha256"])
        for name, entry in held.items()
        if name != PLAN_FILE
    }
    for name in members:
        if not is_member_name(name) or name in OWN_FILES:
            raise EngineError(
                f"{engine.folder} has a file {name!r}",
                expected="plain file names, other than those of a bundle itself",
                fix="save the ONNX file with another name for its weights, and build it again",
            )
    proof = _sample(engine, sample)
    members[TARGET_FILE] = content(target_text(engine.target).encode())
    members[SAMPLE_FILE] = content(proof.as_bytes())
    members[README_FILE] = content(_readme(engine, proof, bound).encode())
    members[SIDECAR] = content(_sidecar(engine, members, bound))
    place_file(path, lambda stream: write_archive(stream, members))


def target_text(target: Target) -> str:
    """The target as a TOML file, with every key that its runtime takes."""
    values = {
        key: value
        for key, value in target.model_dump(mode="json").items()
        if target.runtime in RUNTIMES_OF.get(key, (target.runtime,)) and value != {}
    }
    return toml_text(values)


def _sidecar(engine: Engine, members: Mapping[str, Content], tolerance: float) -> bytes:
    body: dict[str, Any] = {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "name": engine.manifest["name"],
        "tolerance": tolerance,
        ENGINE: engine.manifest,
        "files": {name: {"bytes": one.size, "sha256": one.sha256} for name, one in sorted(members.items())},
    }
    return (json.dumps({**body, "digest": digest_of(body)}, indent=2) + "\n").encode()


def _sample(engine: Engine, given: Mapping[str, np.ndarray] | None) -> Sample:
    """Inputs, and the outputs of the engine's ONNX graph in ONNX Runtime."""
    for spec in (*engine.inputs, *engine.outputs):
        if not is_plain(spec):
            raise EngineError(
                f"{spec} has a type that NumPy files do not have",
                expected="inputs and outputs of NumPy's own types",
                fix="let the network convert inside: inputs and outputs in float32",
            )
    smallest, largest = engine.batch_range
    extents = {name: extent["opt"] for name, extent in engine.axes.items()}
    ranges = {name: (extent["min"], extent["max"]) for name, extent in engine.axes.items()}
    feeds = given
    if feeds is None:
        feeds = sample_feeds(engine.inputs, min(max(smallest, BATCH), largest), 0, extents)
    check_feeds(feeds, engine.inputs, engine.batch_range, ranges)
    ordered = {spec.name: feeds[spec.name] for spec in engine.inputs}
    return check_sample(ordered, run_graph(engine.folder / ONNX_FILE, ordered))


def _readme(engine: Engine, sample: Sample, tolerance: float) -> str:
    manifest = engine.manifest
    onnx = ", ".join(sorted(set(manifest["files"]) - {PLAN_FILE}))
    rows = {
        "target": f"{engine.target.name} ({TARGET_FILE})",
        "built by": " ".join(manifest["runtime"].values()),
        "precision": manifest["precision"]["built"],
        "inputs": ", ".join(map(str, engine.inputs)),
        "outputs": ", ".join(map(str, engine.outputs)),
        "batch": "{} to {}".format(*engine.batch_range),
        "key": manifest["key"],
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    shape = ", ".join(f"{key} {list(array.shape)}" for key, array in sample.inputs.items())
    return f"""# {manifest["name"]}: an engine to rebuild

| | |
| --- | --- |
{table}

With deploy-sparse {manifest["environment"]["deploy-sparse"]} or newer, on the machine that will run it:

```
deploy-sparse bundle --verify FILE.zip
deploy-sparse bundle --rebuild FILE.zip --out engines/out
deploy-sparse bundle --rebuild FILE.zip --out engines/out --target NAME
```

`--verify` checks the SHA-256 of every file and runs the graph on the parity sample. `--rebuild` compiles the engine for
this target, or another one, and runs that on the sample. Either way outputs may differ from the sample's by at most
{tolerance:g} of the largest. Nothing in this file is run or unpickled before its hash was checked.

* {onnx}: the graph and its weights
* {TARGET_FILE}: what the engine is built for
* {SAMPLE_FILE}: the parity sample, {shape} and the outputs that ONNX Runtime gave; `numpy.load` reads it
* {SIDECAR}: size and SHA-256 of every file, and the manifest of the engine that was bundled
"""
