"""What :func:`deploy_sparse.build_engine` may be given, as a verified ONNX file; everything else is told what to do."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, NoReturn

from ..artifact import kind_of
from ..errors import ArtifactError, BuildError
from .entry import ONNX_FILE, Engine
from .onnx_file import OnnxFile, read_onnx

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
    from .export import export_onnx

    return export_onnx(module, inputs, scratch)


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
        fix = f"pass its {made}" if subject.target.runtime != "torch" else "pass the network that it was built from"
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
