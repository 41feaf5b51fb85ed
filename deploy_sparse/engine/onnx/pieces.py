"""Many small modules as ONNX files of their own, by one export: exporting takes seconds however small a module is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import torch
from onnx.utils import Extractor
from torch import nn

from ...artifact import write_bytes
from .export import SIZE_LIMIT, export_onnx
from .file import OnnxFile, parse_graph, read_onnx

BYTES_AT_ONCE = SIZE_LIMIT // 4  # several copies of an export are in memory at a time


def _rename_(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


class _SideBySide(nn.Module):
    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each part on its own input."""
        return tuple(part(x) for part, x in zip(self.parts, inputs, strict=True))


def export_pieces(
    modules: Mapping[str, nn.Module], inputs: Mapping[str, torch.Tensor], folder: Path
) -> dict[str, OnnxFile]:
    """Export modules of one input and one output each; they are checked together as :func:`export_onnx` does.

    An export takes as many of them as ``BYTES_AT_ONCE`` holds, and at least one.

    Args:
        modules: by name, in evaluation mode.
        inputs: an example for each, batch first; the same batch size for all.
        folder: where the files go.

    Raises:
        ExportError: one of them cannot be exported, or computes something else.
    """
    found: dict[str, OnnxFile] = {}
    for names in _batches(modules):
        found |= _exported({name: modules[name] for name in names}, inputs, folder, len(found))
    return found


def _batches(modules: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    names: list[str] = []
    total = 0
    for name, module in modules.items():
        size = sum(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers()))
        if names and total + size > BYTES_AT_ONCE:
            yield names
            names, total = [], 0
        names, total = [*names, name], total + size
    if names:
        yield names


def _exported(
    modules: Mapping[str, nn.Module], inputs: Mapping[str, torch.Tensor], folder: Path, first: int
) -> dict[str, OnnxFile]:
    """By one export; the files are numbered from ``first`` on."""
    names = list(modules)
    together = _SideBySide(list(modules.values())).eval()
    whole = export_onnx(together, [inputs[name] for name in names], folder / f"from{first}.onnx")
    if len(names) == 1:
        return {names[0]: whole}
    graph = parse_graph(whole.path, whole.read())
    found = {}
    for number, (name, entry, result) in enumerate(zip(names, whole.inputs, whole.outputs, strict=True), first):
        piece = Extractor(graph).extract_model([entry.name], [result.name])
        _rename_(piece.graph, {entry.name: "input", result.name: "output"})
        path = folder / f"{number}.onnx"
        write_bytes(path, piece.SerializeToString(deterministic=True))
        found[name] = read_onnx(path)
    return found
