"""A network's time as a sum, what cut networks say of it, and the file."""

import json

import pytest
from latency_samples import CONV, Synthetic, staircase, store

from deploy_sparse.errors import ArtifactError, ConfigError
from deploy_sparse.tune.latency.cuts import Timed, context_of, judged
from deploy_sparse.tune.latency.measure import sample
from deploy_sparse.tune.latency.shapes import LayerShape
from deploy_sparse.tune.latency.table import Cut, LatencyTable, read_table

HEAD = LayerShape("linear", 512, 10)
LAYERS = {"stem": CONV, "twin": CONV, "head": HEAD}


@pytest.fixture(scope="module")
def table():
    found = sample(LAYERS, Synthetic(staircase(16)), store(), seconds=60)
    return LatencyTable(
        target={"name": "cpu", "digest": "0" * 64, "runtime": "onnxruntime", "threads": 1, "width_multiple": 4},
        batch=1,
        layers=LAYERS,
        surfaces=found.surfaces,
        clock="cpu",
        dense_ms=100.0,
        context=1.25,
        staircases=found.staircases,
        multiple=found.multiple,
        cuts=(Cut("half", 0.3, None, None, 0.25, 0.32), Cut("most", 0.1, 0.09, 0.11, 0.08, None)),
        environment={"torch": "2"},
    )


def test_the_dense_network_takes_what_was_measured(table):
    assert table.network_ms({}) == pytest.approx(100.0, rel=1e-12)
    dense = {path: (shape.c_in, shape.c_out) for path, shape in LAYERS.items()}
    assert table.network_ms(dense) == pytest.approx(100.0, rel=1e-12)


def test_a_cut_network_loses_what_its_layers_lose(table):
    lost = 1.25 * (staircase(16)(CONV) - staircase(16)(CONV.with_counts(256, 256)))
    assert table.network_ms({"stem": (256, 250)}) == pytest.approx(100.0 - lost, rel=0.01)
    assert table.ms("stem", 256, 250) == table.ms("twin", 256, 256)
    assert table.rest_ms == pytest.approx(100 - sum(table.ms(p, s.c_in, s.c_out) for p, s in LAYERS.items()))


def test_layers_and_counts_that_it_does_not_have_are_refused(table):
    with pytest.raises(ConfigError, match=r"no layer 'steam'[\s\S]*did you mean 'stem'"):
        table.ms("steam", 1, 1)
    with pytest.raises(ConfigError, match="no layer 'steam'"):
        table.network_ms({"steam": (1, 1)})
    with pytest.raises(ConfigError, match="600 output channels"):
        table.network_ms({"stem": (256, 600)})


def test_the_error_is_the_largest_of_what_was_predicted(table):
    assert table.cuts[0].error == pytest.approx(0.32 / 0.3 - 1)
    assert table.cuts[1].error is None
    assert table.error == pytest.approx(0.32 / 0.3 - 1)


def test_the_file_gives_the_same_table(table, tmp_path):
    path = table.save(tmp_path / "deep" / "table.json")
    assert read_table(path) == table
    assert read_table(path.parent) == table
    stored = json.loads(path.read_text())
    assert stored["schema_version"] == 1
    whole = next(entry for entry in stored["surfaces"] if entry["layer"]["kind"] == "conv")
    assert [256, 512, staircase(16)(CONV), 1.0] in whole["points"]


def altered(path, change):
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))
    return path


def test_damage_and_other_files_are_told(table, tmp_path):
    path = table.save(tmp_path / "table.json")
    with pytest.raises(ArtifactError, match="its digest does not match its content"):
        read_table(altered(path, lambda stored: stored.update(dense_ms=1.0)))
    with pytest.raises(ArtifactError, match="has schema version 2"):
        read_table(altered(path, lambda stored: stored.update(schema_version=2)))
    with pytest.raises(ArtifactError, match="is no latency table"):
        read_table(altered(path, lambda stored: stored.update(kind="report")))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="is not valid JSON"):
        read_table(path)
    with pytest.raises(ArtifactError, match="does not exist"):
        read_table(tmp_path / "none.json")


def cut(name, layers, context, dense_ms=100.0, layers_ms=50.0):
    return Timed(name, 1 - context * layers_ms * (1 - layers) / dense_ms, None, None, layers)


def test_cut_networks_say_how_much_layers_count():
    cuts = [cut("a", 0.5, 1.6), cut("b", 0.25, 1.6), cut("c", 0.1, 1.6)]
    assert context_of(cuts, 50.0, 100.0) == pytest.approx(1.6, rel=0.01)
    assert all(abs(found.error) < 0.1 for found in judged(cuts, 50.0, 100.0))


def test_where_everything_scales_nothing_is_left_without_layers():
    cuts = [cut("a", 0.5, 2.0), cut("b", 0.25, 2.0)]
    assert context_of(cuts, 50.0, 100.0) == pytest.approx(2.0)
    assert all(found.error == pytest.approx(0) for found in judged(cuts, 50.0, 100.0))


def test_a_network_is_predicted_from_the_others_alone():
    cuts = [cut("a", 0.5, 2.0), cut("b", 0.25, 2.0), cut("odd", 0.25, 1.5)]
    found = {entry.name: entry for entry in judged(cuts, 50.0, 100.0)}
    assert found["odd"].predicted == pytest.approx(cut("", 0.25, 2.0).ratio)
    assert found["odd"].error < -0.4
    assert judged(cuts[:1], 50.0, 100.0)[0].predicted is None


def test_without_cut_networks_layers_count_what_they_take_alone():
    assert context_of([], 50.0, 100.0) == 1.0


def test_networks_that_are_slower_than_dense_do_not_turn_layers_round():
    assert context_of([Timed("slower", 40.0, None, None, 0.001)] * 3, 50.0, 100.0) > 0
