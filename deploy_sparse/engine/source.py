"""What :func:`deploy_sparse.build_engine` may be given, as a verified ONNX file; everything else is told what to do."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, NoReturn

from ..artifact import kind_of, sha256_file
from ..errors import ArtifactError, BuildError
from .entry import ONNX_FILE, OWN_FILES, Engine
from .onnx.file import OnnxFile, is_contradicted, read_onnx, sidecar_path

_EXPECTED = "an nn.Module (or an object with one in .module), the path of an ONNX file, or an OnnxFile"


def onnx_of(subject: Any, example_inputs: Any, scratch: Path) -> OnnxFile:
    """The subject's ONNX file; a module is exported to ``scratch``.

    Raises:
        BuildError: something else, or a module without example inputs. ArtifactError: no such file, a damaged one, or
        a folder. ExportError: the module does not export exactly.
    """
    if isinstance(subject, OnnxFile):
        return subject
    if isinstance(subject, str | Path) and not Path(subject).is_dir():
        return read_onnx(subject)
    module, inputs = module_of(subject, example_inputs)
    from .onnx.export import export_onnx

    return export_onnx(module, inputs, scratch)


def identity_of_file(subject: Any) -> str | None:
    """The identity of an ONNX subject by hashing its bytes alone, which is much faster than reading the graph.

    That is enough to find an engine that was built from the very same file. None for other subjects, and for files
    that cannot be read, or whose sidecar tells of others. Of a path this is the hash of its bytes; where those name
    other files with weights it is no engine's identity, and only :func:`onnx_of` finds the right one.

    Raises:
        ArtifactError: an ``OnnxFile`` whose file was altered since.
    """
    if isinstance(subject, OnnxFile):
        subject.read()
        for file in subject.weights:
            file.check(subject.path)
        return subject.identity
    if not isinstance(subject, str | Path):
        return None
    try:
        found = sha256_file(Path(subject))
    except (OSError, ValueError):
        return None  # reading it in earnest says why, and so it does of a sidecar
    return None if is_contradicted(Path(subject), found) else found


def payload_of(source: OnnxFile, graph: bytes) -> dict[str, bytes | memoryview]:
    """What an entry holds of an ONNX file: the file, what is known of it, and its weights where they are in others.

    Args:
        graph: the file's verified bytes.

    Raises:
        BuildError: a file of weights has a name that the entry needs. ArtifactError: one was altered since it was read.
    """
    for file in source.weights:
        if file.name in OWN_FILES:
            raise BuildError(
                f"{source.path} keeps weights in a file called {file.name}",
                expected="a name that no file of an engine has",
                fix="save it anew: onnx.save(onnx.load(path), new_path, save_as_external_data=True, "
                "location='weights.bin')",
            )
    # the file's own facts travel with it, so that a rebuild elsewhere keeps parameters, MACs and parity; they come
    # before the weights, so that a half-written entry tells which files are its own
    facts = (json.dumps(source.sidecar(), indent=2) + "\n").encode()
    return {ONNX_FILE: graph, sidecar_path(Path(ONNX_FILE)).name: facts, **source.read_weights()}


def module_of(subject: Any, example_inputs: Any) -> tuple[Any, Any]:
    """The subject, which is a module or has one, and example inputs for it.

    Raises:
        BuildError: something else, or a module without example inputs. ArtifactError: a folder.
    """
    if isinstance(subject, str | Path) and Path(subject).is_dir():
        _refuse_folder(Path(subject))
    if isinstance(subject, OnnxFile | str | Path):
        path = subject.path if isinstance(subject, OnnxFile) else subject
        raise BuildError(
            f"{path} was given for a torch target",
            expected="an nn.Module (or an object with one in .module) with example_inputs: PyTorch runs no ONNX graphs",
            fix="pass the network that was exported, or build the file for a target of another runtime: cpu",
        )
    if isinstance(subject, Engine):
        made = subject.folder / ONNX_FILE
        fix = f"pass its {made}" if not subject.target.from_module else "pass the network that it was built from"
        raise BuildError(f"an engine was given, {subject.folder}", expected=_EXPECTED, fix=fix)
    from torch import nn

    if not any(isinstance(candidate, nn.Module) for candidate in (subject, getattr(subject, "module", None))):
        raise BuildError(
            f"a {type(subject).__name__} was given",
            expected=_EXPECTED,
            fix="pass the network itself; of a ticket: deploy_sparse.compact(ticket) first; of a state dict: construct "
            "the network and load it first",
        )
    if example_inputs is None:
        example_inputs = getattr(subject, "example_inputs", None)  # a compact network knows what it was verified on
    if example_inputs is None:
        raise BuildError(
            f"a {type(subject).__name__} was given without example_inputs",
            expected="example inputs to trace the module with",
            fix="pass for example example_inputs=torch.randn(2, 3, 32, 32)",
        )
    return subject, example_inputs


def _refuse_folder(folder: Path) -> NoReturn:
    kind, shell = kind_of(folder), f"run: deploy-sparse build {shlex.quote(str(folder))}"
    what, fix = {
        "engine": ("an engine", f"build from the graph in it: {folder / ONNX_FILE}"),
        "ticket": ("a ticket", f"pass deploy_sparse.compact({str(folder)!r}), or {shell}"),
        "plan": ("a compact network", f"pass deploy_sparse.load_compact({str(folder)!r}), or {shell}"),
    }.get(kind or "", (f"a {kind}" if kind else "a folder", "name an ONNX file"))
    if kind == "engine" and not (folder / ONNX_FILE).is_file():
        fix = "pass the network that it was built from"
    if kind is None and (folder / "run.json").is_file():
        what, fix = "a run folder", f"run: deploy-sparse build {shlex.quote(str(folder / 'compact'))}"
    raise ArtifactError(f"{folder} is {what}", expected=_EXPECTED, fix=fix)
