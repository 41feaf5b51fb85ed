"""A network's latency as a sum over its layers, at any channel counts, on one target at one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...artifact import canonical_json, read_json, sha256_bytes, write_json
from ...errors import ArtifactError, ConfigError, nearest
from .multiple import Staircase
from .shapes import LayerShape, shape_from_json
from .surface import Surface

SCHEMA_VERSION = 1
KIND = "latency-table"
REMAKE = "deploy-sparse table --target NAME --network NETWORK"


@dataclass(frozen=True)
class Cut:
    """A network of the same layers with fewer channels, timed beside the dense one.

    Attributes:
        name: what it is.
        ratio: its time over the dense one's, measured.
        low, high: 95 % interval of ``ratio`` by wall time, None by CPU time and with too few blocks for one.
        layers: sum over its layers alone over that sum of the dense network's, as the surfaces have it.
        predicted: the ratio that the table gives where every *other* cut, and not this one, says how much a layer's
            time counts amid the network; None where there is no other.
    """

    name: str
    ratio: float
    low: float | None
    high: float | None
    layers: float
    predicted: float | None

    @property
    def error(self) -> float | None:
        """Relative error of ``predicted``."""
        return None if self.predicted is None else self.predicted / self.ratio - 1


@dataclass(frozen=True)
class LatencyTable:
    """Latency over channel counts.

    A network's time is ``rest_ms`` plus the sum of its layers; at the dense widths that is ``dense_ms``, which was
    measured. A layer counts ``context`` times what it takes alone: what comes with its channels (activations that were
    not fused, sums, pooling) is in there, and what does not is in the rest.

    Attributes:
        target: name, digest and runtime of the target, and its own ``width_multiple``.
        batch: samples of a call.
        layers: shape of every layer by module path, as it is in the dense network.
        surfaces: latency of each distinct shape alone.
        clock: ``"cpu"``: times are CPU time, which one thread on an idle machine takes by the wall clock too;
            ``"wall"`` for several threads and GPUs.
        dense_ms: measured time of the dense network: the mean of its calls by CPU time, their lower quartile by wall
            time.
        context: time of a layer amid the network over its time alone; 1 where no narrower network was timed.
        staircases: where the multiple was read.
        multiple: what widths are to be rounded up to.
        cuts: narrower networks that were timed, and what the table predicts for them.
        environment: versions and machine.
    """

    target: Mapping[str, Any]
    batch: int
    layers: Mapping[str, LayerShape]
    surfaces: Mapping[LayerShape, Surface]
    clock: str
    dense_ms: float
    context: float
    staircases: tuple[Staircase, ...]
    multiple: int
    cuts: tuple[Cut, ...]
    environment: Mapping[str, str]

    @property
    def rest_ms(self) -> float:
        """What the network takes besides its layers, in ms; below 0 where layers alone take longer than together."""
        return self.dense_ms - sum(self.ms(path, shape.c_in, shape.c_out) for path, shape in self.layers.items())

    @property
    def error(self) -> float | None:
        """Largest relative error of a predicted network; None where fewer than two were timed."""
        return max((abs(cut.error) for cut in self.cuts if cut.error is not None), default=None)

    def ms(self, path: str, c_in: int, c_out: int) -> float:
        """What a layer adds to the network's time in ms with these channel counts, rounded up to the next step.

        Raises:
            ConfigError: no such layer, or counts outside 1 … dense.
        """
        return self.context * self.surfaces[self._layer(path)].ms(c_in, c_out)

    def network_ms(self, widths: Mapping[str, tuple[int, int]]) -> float:
        """Time of the network with these (c_in, c_out) by path; layers that are not named stay dense.

        Raises:
            ConfigError: no such layer, or counts outside 1 … dense.
        """
        for path in widths:
            self._layer(path)
        dense = {path: (shape.c_in, shape.c_out) for path, shape in self.layers.items()}
        return self.rest_ms + sum(self.ms(path, *counts) for path, counts in {**dense, **widths}.items())

    def save(self, path: str | Path) -> Path:
        """Write the table as one JSON file, whole or not at all.

        Raises:
            ArtifactError: it cannot be written.
        """
        body = self._as_json()
        write_json(Path(path), {**body, "digest": sha256_bytes(canonical_json(body))})
        return Path(path)

    def _layer(self, path: str) -> LayerShape:
        if path not in self.layers:
            paths = tuple(self.layers)
            raise ConfigError(
                f"the table has no layer {path!r}",
                expected=f"one of its {len(paths)} layers, such as {', '.join(paths[:3])}",
                fix=f"{nearest(str(path), paths)}make a table of the network that has it",
            )
        return self.layers[path]

    def _as_json(self) -> dict[str, Any]:
        shapes = list(self.surfaces)
        return {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "target": dict(self.target),
            "batch": self.batch,
            "clock": self.clock,
            "dense_ms": self.dense_ms,
            "context": self.context,
            "multiple": self.multiple,
            "layers": {path: shapes.index(shape) for path, shape in self.layers.items()},
            "surfaces": [_surface_as_json(surface) for surface in self.surfaces.values()],
            "staircases": [
                {"layer": s.layer.as_json(), "ms": [[c, *(found[c] for found in s.passes)] for c in s.passes[0]]}
                for s in self.staircases
            ],
            "cuts": [{name: getattr(cut, name) for name in Cut.__dataclass_fields__} for cut in self.cuts],
            "error": self.error,
            "environment": dict(self.environment),
        }


def read_table(path: str | Path) -> LatencyTable:
    """The table that :meth:`LatencyTable.save` wrote at ``path``; of a folder, its ``table.json``.

    Raises:
        ArtifactError: missing, altered, or no table.
    """
    file = Path(path) / "table.json" if Path(path).is_dir() else Path(path)
    stored = read_json(file)
    if not isinstance(stored, dict) or stored.get("kind") != KIND:
        raise ArtifactError(f"{file} is no latency table", expected="the table.json of a table", fix=REMAKE)
    if stored.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"{file} has schema version {stored.get('schema_version')}",
            expected=f"schema version {SCHEMA_VERSION}",
            fix=f"make it again with this version: {REMAKE}",
        )
    digest = stored.pop("digest", None)
    try:
        if sha256_bytes(canonical_json(stored)) != digest:
            raise ValueError("its digest does not match its content")
        return _table(stored)
    except (KeyError, TypeError, ValueError, IndexError) as problem:
        raise ArtifactError(
            f"{file} is damaged ({problem})", expected="the file as it was written", fix=f"make it again: {REMAKE}"
        ) from None


def _table(stored: Mapping[str, Any]) -> LatencyTable:
    found = [_surface(entry) for entry in stored["surfaces"]]
    return LatencyTable(
        target=stored["target"],
        batch=stored["batch"],
        layers={path: found[number].layer for path, number in stored["layers"].items()},
        surfaces={surface.layer: surface for surface in found},
        clock=stored["clock"],
        dense_ms=stored["dense_ms"],
        context=stored["context"],
        staircases=tuple(_staircase(entry) for entry in stored["staircases"]),
        multiple=stored["multiple"],
        cuts=tuple(Cut(**cut) for cut in stored["cuts"]),
        environment=stored["environment"],
    )


def _staircase(stored: Mapping[str, Any]) -> Staircase:
    passes = zip(*([(count, ms) for ms in times] for count, *times in stored["ms"]), strict=True)
    return Staircase(shape_from_json(stored["layer"]), tuple(dict(found) for found in passes))


def _surface_as_json(surface: Surface) -> dict[str, Any]:
    """Every point with its raw time and its ratio to the dense layer's."""
    whole = surface.points[surface.layer.c_in, surface.layer.c_out]
    return {
        "layer": surface.layer.as_json(),
        "step": surface.step,
        "points": [[i, j, ms, ms / whole] for (i, j), ms in sorted(surface.points.items())],
        "checks": [[i, j, ms, ms / whole] for (i, j), ms in sorted(surface.checks.items())],
        "rows": list(surface.rows),
        "columns": list(surface.columns),
        "settled": surface.settled,
        "error": surface.error,
    }


def _surface(stored: Mapping[str, Any]) -> Surface:
    return Surface(
        shape_from_json(stored["layer"]),
        stored["step"],
        {(i, j): ms for i, j, ms, _ in stored["points"]},
        tuple(stored["rows"]),
        tuple(stored["columns"]),
        {(i, j): ms for i, j, ms, _ in stored["checks"]},
        stored["settled"],
    )
