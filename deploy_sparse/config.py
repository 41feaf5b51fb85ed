"""Configurations: defaults < TOML file < command line, strict at every level, printed back with origins.

A configuration is a :class:`Config` subclass (frozen, typed by pydantic). Unknown keys are refused with the nearest
known name; values are refused with what the field accepts.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from .errors import ConfigError


class Config(BaseModel):
    """Base of every configuration and target: immutable, unknown keys forbidden, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


C = TypeVar("C", bound=Config)


class Word(str):
    """A value from the command line, still text: the field it meets decides what it is."""


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        ConfigError: missing, unreadable or not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist", expected="a TOML file", fix="check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise ConfigError(f"{path} is not valid TOML: {problem}", expected="TOML", fix="mend that line") from None
    except OSError as problem:
        raise ConfigError(
            f"{path} cannot be read ({problem.strerror})", expected="a readable TOML file", fix="check the path"
        ) from None


def config_from(kind: type[C], *layers: Mapping[str, Any], source: str = "the configuration") -> C:
    """Build ``kind`` from nested dictionaries, later ones winning key by key.

    Raises:
        ConfigError: an unknown key, a missing one, or a value out of range; ``source`` names where to mend it.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer)
    try:
        return kind.model_validate(_resolved(kind, merged))
    except ValidationError as problem:
        raise _readable(kind, problem.errors()[0], source) from None


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """``["--fit.epochs", "3", "--seed=1"]`` as ``{"fit": {"epochs": "3"}, "seed": "1"}``.

    Values stay text (:class:`Word`) and are converted by the field they meet; lists and tables are read as TOML, and
    so is what ends up in a free table such as ``model.arguments``. ``-`` and ``_`` in keys are the same.

    Raises:
        ConfigError: an argument that is no ``--key value`` pair.
    """
    result: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, value = argument.partition("=")
        if not key.startswith("--") or len(key) == 2:
            raise ConfigError(
                f"{argument!r} is no option", expected="--key value, for example --fit.epochs 3", fix="add the key"
            )
        if not equals:
            if not rest:
                raise ConfigError(f"{key} has no value", expected=f"{key} VALUE", fix="add the value")
            value = rest.pop(0)
        node = result
        *parents, leaf = key[2:].replace("-", "_").split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(
                    f"{key} goes into {parent!r}, which another option set to one value",
                    expected="each key given once, as a value or as a table",
                    fix="drop one of the two options",
                )
        node[leaf] = _value(value)
    return result


def keys_of(kind: type[Config], prefix: str = "") -> dict[str, tuple[str, Any, str]]:
    """Every dotted key of a configuration: its type as text, its default and its description."""
    found: dict[str, tuple[str, Any, str]] = {}
    for name, field in kind.model_fields.items():
        nested = _nested(field.annotation)
        if nested is not None:
            found |= keys_of(nested, f"{prefix}{name}.")
        else:
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            annotation = field.annotation
            text = annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
            found[f"{prefix}{name}"] = (text.replace("typing.", ""), default, field.description or "")
    return found


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested dictionary, in order."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines ``key: old -> new`` for every dotted key whose value differs."""
    left, right = dict(flatten(old)), dict(flatten(new))
    return [
        f"{key}: {left.get(key, 'absent')} -> {right.get(key, 'absent')}"
        for key in sorted({*left, *right})
        if left.get(key, "absent") != right.get(key, "absent")
    ]


UNSET = "# {} = …"
"""How :func:`toml_text` writes a key without a value."""


def toml_text(values: Mapping[str, Any], *, unset: bool = False) -> str:
    """``values`` as a TOML document; None values are left out, as TOML has no null, or ``unset`` as comments."""
    return "\n".join(_table_lines("", values, unset)).strip() + "\n"


def _table_lines(prefix: str, values: Mapping[str, Any], unset: bool) -> list[str]:
    lines = [
        UNSET.format(_toml_key(key)) if value is None else f"{_toml_key(key)} = {_toml_value(value)}"
        for key, value in values.items()
        if not isinstance(value, Mapping) and (unset or value is not None)
    ]
    for key, value in values.items():
        if isinstance(value, Mapping):
            table = f"{prefix}{_toml_key(key)}"
            lines += ["", f"[{table}]", *_table_lines(f"{table}.", value, unset)]
    return lines


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_string(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return _toml_string(value) if isinstance(value, str) else json.dumps(value)  # the rest is as in JSON


def _toml_string(text: str) -> str:
    """JSON's form in ASCII, but for what TOML takes otherwise: characters beyond 16 bits, and DEL."""
    quoted = json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
    return "".join(c if c.isascii() else f"\\u{ord(c):04x}" if ord(c) < 1 << 16 else f"\\U{ord(c):08x}" for c in quoted)


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(merged.get(key), Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _value(text: str) -> Any:
    return _from_toml(text) if text[:1] in ("[", "{") else Word(text)


def _from_toml(text: str) -> Any:
    """``text`` as a TOML value; text where it is none, or one that JSON does not have."""
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return str(text)
    value = found["value"]
    plain = isinstance(value, bool | int | str | list | dict) or (isinstance(value, float) and math.isfinite(value))
    return value if plain and len(found) == 1 else str(text)


def _resolved(annotation: Any, value: Any) -> Any:
    """``value`` with every :class:`Word` as the annotation wants it; what pydantic converts stays text."""
    if isinstance(value, Mapping):
        nested = _nested(annotation)
        fields = nested.model_fields if nested else {}
        inner = {key: field.annotation for key, field in fields.items()}
        return {key: _resolved(inner.get(key, None if nested else Any), part) for key, part in value.items()}
    if not isinstance(value, Word):
        return value
    read = _from_toml(value)
    known = [word for kind in _kinds(annotation) if get_origin(kind) is Literal for word in get_args(kind)]
    return read if annotation is Any or type(read) in {type(word) for word in known} else str(value)


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The annotation without its constraints; of a union, each member."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(kind for member in get_args(annotation) for kind in _kinds(member))
    return (annotation,)


_WORDS = {  # what pydantic says in Python's words: what is expected, and an example
    "int_parsing": ("a whole number", "3"),
    "int_from_float": ("a whole number", "3"),
    "float_parsing": ("a number", "0.1"),
    "tuple_type": ("a list", ""),
    "too_short": ("a list with at least one entry", ""),
}
_ITEMS = {int: "'[1, 2]'", float: "'[0.1, 0.2]'", str: "'[\"cpu\"]'"}


def _list_example(kind: type[Config], path: list[str]) -> str:
    """What to write for the list at ``path``, by the type of its items."""
    annotation: Any = kind
    for part in path:
        nested = _nested(annotation)
        field = nested.model_fields.get(part) if nested else None
        annotation = field.annotation if field else Any
    items = [item for member in _kinds(annotation) for item in get_args(member)[:1]]
    return next((_ITEMS[base] for item in items for base in _kinds(item) if base in _ITEMS), "'[…]'")


def _nested(annotation: Any) -> type[Config] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Config):
            return candidate
    return None


def _readable(kind: type[Config], detail: ErrorDetails, source: str) -> ConfigError:
    path = [str(part) for part in detail["loc"]]
    key = ".".join(path)
    if detail["type"] == "extra_forbidden":
        return _unknown(kind, path, detail["input"], source)
    if detail["type"] == "missing":
        return ConfigError(f"{key!r} is missing in {source}", expected="a value for it", fix=f"add it: --{key} VALUE")
    if detail["type"] in _WORDS:
        expected, example = _WORDS[detail["type"]]
        whole = path[: next((i for i, part in enumerate(detail["loc"]) if isinstance(part, int)), len(path))]
        if not example or whole != path:  # a list, or an entry of one
            example = _list_example(kind, whole)
        fix = f"for example --{'.'.join(whole)} {example}"
        return ConfigError(f"{key} = {detail['input']!r} in {source}", expected=expected, fix=fix)
    message = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if detail["type"] == "value_error" and isinstance(detail["input"], Mapping | BaseModel):  # of a table, or of all
        return _not_together(key, dict(detail["input"]), message, source)
    return ConfigError(
        f"{key} = {detail['input']!r} in {source}", expected=message, fix=f"choose another value: --{key} VALUE"
    )


def not_together(source: str) -> str:
    """What is given where the values of a whole configuration do not go together."""
    return f"{source} has keys that do not go together"


def _not_together(table: str, values: Mapping[str, Any], message: str, source: str) -> ConfigError:
    """Values that are right each by itself; ``table`` is empty for the whole configuration, which is not printed."""
    if not table:
        return ConfigError(not_together(source), expected=message, fix="change one of them")
    given = ", ".join(f"{table}.{name} = {value!r}" for name, value in values.items())
    fix = " or ".join(f"--{table}.{name} VALUE" for name in values)
    return ConfigError(f"{given or f'{table} is empty'} in {source}", expected=message, fix=f"change {fix or 'it'}")


def _unknown(kind: type[Config], path: list[str], value: Any, source: str) -> ConfigError:
    """An unknown key, or an unknown table, of which the first key is named; with the nearest key or table."""
    inner = next((name for name, _ in flatten(value)), "") if isinstance(value, Mapping) else ""
    key = ".".join([*path, inner] if inner else path)
    keys = list(keys_of(kind))
    known = [*keys, *dict.fromkeys(parents for k in keys if (parents := k.rpartition(".")[0]))]
    meant = _nearest_key(key, known) or _nearest_key(".".join(path), known)
    table = path[:-1] if not meant else meant.split(".")[:-1] if meant in keys else meant.split(".")
    hint = f"did you mean {meant!r}? " if meant else ""
    return ConfigError(f"unknown key {key!r} in {source}", expected=_keys_in(kind, table), fix=f"{hint}mend the key")


def _nearest_key(key: str, known: list[str]) -> str:
    """The known dotted key that is like ``key`` as a whole and in its last part; empty without a similar one."""

    def likeness(other: str) -> float:
        pairs = ((key, other), (key.rpartition(".")[2], other.rpartition(".")[2]))
        return sum(SequenceMatcher(None, *pair).ratio() for pair in pairs) / 2

    best = max(known, key=likeness, default="")
    return best if best and likeness(best) >= 0.6 else ""  # difflib's own bound, as everywhere in this package


def _keys_in(kind: type[Config], table: list[str]) -> str:
    """What the table at ``table`` holds, in words: its own keys, and the tables in it."""
    for part in table:
        field = kind.model_fields.get(part)  # none for the number of a list's entry
        kind = (_nested(field.annotation) if field else None) or kind
    prefix = "".join(f"{part}." for part in table)
    tables = [prefix + name for name, field in kind.model_fields.items() if _nested(field.annotation)]
    keys = [prefix + name for name in kind.model_fields if prefix + name not in tables]
    words = [f"one of {', '.join(keys)}" if keys else "", f"a key of {', '.join(tables)}" if tables else ""]
    return ", or ".join(filter(None, words))
