"""A compact network as ``compact.pt2``: the ``torch.export`` form, which loads without any model code."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from .. import artifact
from ..errors import ArtifactError
from ..programs import program
from .graph import Inputs, as_tuple

FILE = "compact.pt2"
REMAKE = "deploy-sparse compact <ticket>"
_OTHERWISE = "the compact network itself is fine: load it with its factory instead"


def program_bytes(module: nn.Module, example_inputs: Inputs) -> bytes:
    """The content of a ``.pt2`` file of ``module``, see :func:`~..programs.program.program_bytes`.

    Args:
        module: the network, on any device; the file is for the CPU. It is not changed.
        example_inputs: one tensor with a batch axis, or the tuple of positional inputs.

    Raises:
        ExportError: see there.
    """
    return program.program_bytes(module, as_tuple(example_inputs), otherwise=_OTHERWISE)


def save_program(module: nn.Module, example_inputs: Inputs, path: str | Path) -> Path:
    """Write :func:`program_bytes` to ``path`` atomically and return the path.

    Raises:
        ExportError: see :func:`program_bytes`; nothing is written.
        ArtifactError: ``path`` does not end in ``.pt2`` (PyTorch's loader asks for that), or cannot be written.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ArtifactError(f"path {str(path)!r}", expected="a name ending in .pt2", fix=f"{path.with_suffix('.pt2')}")
    artifact.write_bytes(path, program_bytes(module, example_inputs))
    return path


def load_program(path: str | Path) -> nn.Module:
    """The network in a ``.pt2`` file, on the CPU, as a module that needs no model code.

    Its state dict has the names of the compact network. It can be fine-tuned, but layers that behave otherwise in
    training (BatchNorm, dropout) stay as in evaluation.

    Args:
        path: a compact network's folder, whose hashes are verified first, or a file of :func:`save_program`.

    Raises:
        ArtifactError: missing, damaged, or anything but a program of tensors and PyTorch's own operators.
    """
    path = Path(path)
    folder = artifact.artifact_folder(path)
    if path.is_file() and artifact.kind_of(folder) != "plan":
        return load_bytes(path.read_bytes(), str(path))
    found = artifact.read_artifact(path, "plan", remake=REMAKE)
    if FILE not in found.files:
        raise ArtifactError(
            f"{found.folder} holds no {FILE}",
            expected="a compact network that torch.export could take",
            fix="load it with its factory: deploy_sparse.load_compact(folder, factory=…)",
        )
    return load_bytes((found.folder / FILE).read_bytes(), str(found.folder / FILE))


def load_bytes(data: bytes, name: str) -> nn.Module:
    """The network in the content of a ``.pt2`` file; ``name`` is for messages.

    Raises:
        ArtifactError: see :func:`load_program`.
    """
    return program.load_bytes(data, name, remake=REMAKE)
