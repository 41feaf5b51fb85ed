"""May a ``.pt2`` file be handed to PyTorch's loader? Only if nothing in it would be unpickled or run as code.

The loader unpickles sample inputs and tensors marked for it, loads native libraries from the archive, evaluates sizes
with ``sympify``, looks operators up by any dotted path from ``torch``, and writes names into generated Python source. A
hash tells that a file is unaltered, not who wrote it; so everything but plain data is refused here.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.export.pt2_archive import PT2ArchiveReader

from ..errors import ArtifactError

_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_GRAPH, _SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
_RECORD = re.compile(
    r"data/weights/weight_\d+|data/constants/tensor_\d+|archive_format|archive_version|byteorder|version|"
    r"\.data/(version|serialization_id)"
)
_PAYLOAD = re.compile(r"(weight|tensor)_\d+")
_NAME = re.compile(r"[\w.]*", re.ASCII)
_TEXT = re.compile(r"[\w ,.>\-]*", re.ASCII)  # string arguments, for example of einsum or padding modes
_VERSION = re.compile(r"[\w.+]*", re.ASCII)
_OPERATOR = re.compile(r"torch\.ops\.(?:aten|prims)\.\w+\.\w+", re.ASCII)
_SCOPES = {f"torch.ops.higher_order.{name}" for name in ("wrap_with_set_grad_enabled", "wrap_with_autocast")}
_ON_SIZES = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)|"
    r"torch\.sym_(float|int|ite|max|min|not|sqrt|sum)|math\.(ceil|floor|trunc)"
)
_PARTS = {"torch.ops.deploy_sparse.tensorrt_part.default"}  # computes nothing; stands for an engine in the file
_FILE_ACCESS = {"torch.ops.aten.from_file.default", "torch.ops.aten.from_file.out"}
_SIZE = re.compile(r"[\w\s+\-*/%(),<>=&|~]*", re.ASCII)
_SYMBOL = re.compile(r"Symbol\('([a-z]+\d+)'(?:, (?:positive|integer|nonnegative)=True)*\)")
_SIZE_WORDS = re.compile(
    r"[a-z]+\d+|\d+|True|False|oo|int_oo|"
    r"(?:Floor|Clean|Ceil|FloatTrue|IntTrue)Div|(?:Python)?Mod|PowByNatural|FloatPow|ModularIndexing|Where|"
    r"(?:Trunc|Round|Floor|Ceil)To(?:Int|Float)|ToFloat|Max|Min|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|Add|Mul|Pow|Integer"
)
_CONTAINERS = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}


def vet(data: bytes, name: str, *, remake: str) -> None:
    """Refuse the content of a ``.pt2`` file unless it is raw tensors and a graph of PyTorch's own operators.

    Args:
        data: the content.
        name: of the file, for messages.
        remake: how such a file is made, for messages.

    Raises:
        ArtifactError: no such archive, or one with anything else in it; ``name`` and what was found are in the message.
    """
    try:
        found = objection(data)
    except (RuntimeError, AssertionError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise ArtifactError(
            f"{name} is not a readable .pt2 file ({str(problem).splitlines()[0] if str(problem) else problem!r})",
            expected="a program written by this toolkit",
            fix=f"make it again: {remake}",
        ) from None
    if found is not None:
        raise ArtifactError(
            f"{name} holds {found}",
            expected="raw tensors and a graph of PyTorch's own operators, nothing pickled and no code",
            fix=f"do not load it; make it again: {remake}",
        )


def objection(data: bytes) -> str | None:
    """The first thing in the content of a ``.pt2`` file that is not plain data, in words, or None."""
    reader = PT2ArchiveReader(io.BytesIO(data))  # the loader's own reader: both see the same records
    records = reader.get_file_names()
    if stray := [each for each in records if each not in _KNOWN and not _RECORD.fullmatch(each)]:
        return f"the record {stray[0]!r}"
    if len(set(records)) != len(records):
        return "two records of one name"
    if _SAMPLES in records and reader.read_bytes(_SAMPLES):
        return "pickled sample inputs"
    try:
        for config in _CONFIGS:
            _vet_payload(json.loads(reader.read_bytes(config)))
        _walk(json.loads(reader.read_bytes(_GRAPH)), "")
    except _Refused as found:
        return str(found)
    return None


class _Refused(Exception):
    """Something a program of ours does not hold."""


_KNOWN = {*_CONFIGS, _GRAPH, _SAMPLES}


def _vet_payload(config: dict[str, Any]) -> None:
    for tensor, entry in config["config"].items():
        if entry["use_pickle"] is not False:
            raise _Refused(f"the pickled tensor {tensor!r}")
        _match(_NAME, "the tensor name", tensor)
        _match(_PAYLOAD, "the tensor file", entry["path_name"])
        _walk(entry["tensor_meta"], "")


def _walk(value: Any, key: str) -> None:
    """Every text of the JSON, each by the rule of the entry it stands under; names of entries are names."""
    if isinstance(value, dict):
        for name, entry in value.items():
            _match(_NAME, "the name", name)
            if name == "guards_code" and entry:
                raise _Refused("guards, which are source code")
            if name == "metadata" and entry:
                raise _Refused("metadata of a node")
            _walk(entry, name)
    elif isinstance(value, list):
        for entry in value:
            _walk(entry, key)
    elif isinstance(value, str):
        _RULES.get(key, _vet_name)(value)


def _vet_name(text: str) -> None:
    _match(_NAME, "the name", text)


def _vet_text(text: str) -> None:
    _match(_TEXT, "the text", text)


def _vet_version(text: str) -> None:
    _match(_VERSION, "the version", text)


def _vet_operator(text: str) -> None:
    if text in _SCOPES or text in _PARTS or _ON_SIZES.fullmatch(text):
        return
    if _OPERATOR.fullmatch(text) and text not in _FILE_ACCESS:
        _, _, namespace, operator, overload = text.split(".")
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        if isinstance(getattr(packet, overload, None), torch._ops.OpOverload):
            return
    raise _Refused(f"the operator {text!r}")


def _vet_size(text: str) -> None:
    plain = _SYMBOL.sub(r"\1", text)
    words = re.findall(r"\w+", plain)
    if not _SIZE.fullmatch(plain) or not all(_SIZE_WORDS.fullmatch(word) for word in words):
        raise _Refused(f"the size {text!r}")


def _vet_containers(text: str) -> None:
    _, spec = json.loads(text)
    pending = [spec]
    while pending:
        node = pending.pop()
        if node["type"] not in _CONTAINERS:
            raise _Refused(f"the container {node['type']!r}")
        keys = json.loads(node["context"]) if node["context"] is not None else None
        for key in keys if isinstance(keys, list) else [] if keys is None else [keys]:
            if not isinstance(key, str) or not _NAME.fullmatch(key):
                raise _Refused(f"the dictionary key {key!r}")
        pending += node["children_spec"]


def _match(pattern: re.Pattern[str], what: str, text: object) -> None:
    if not isinstance(text, str) or not pattern.fullmatch(text):
        raise _Refused(f"{what} {text!r}")


_RULES: dict[str, Callable[[str], None]] = {
    "target": _vet_operator,
    "as_operator": _vet_operator,
    "expr_str": _vet_size,
    "as_string": _vet_text,
    "as_strings": _vet_text,
    "in_spec": _vet_containers,
    "out_spec": _vet_containers,
    "torch_version": _vet_version,
}
