"""Running: every group is measured once, a stopped run goes on, and what cannot be built does not end it."""

import json
import os

import pytest
from suite_samples import FakeBuilds, no_layers, small

from deploy_sparse.artifact import read_json
from deploy_sparse.engine.target import load_target
from deploy_sparse.errors import ArtifactError, ConfigError, Interrupted, RunError, SurgeryError
from deploy_sparse.suites import running
from deploy_sparse.suites.building import Builder
from deploy_sparse.suites.layers import LayerFacts
from deploy_sparse.suites.report import write_suite_report
from deploy_sparse.suites.running import Selection, groups, run, selected_targets
from deploy_sparse.suites.state import opened

ALL = Selection()
LAYERS = LayerFacts(
    network="", subject="", target="cpu", batch=1, ms=10.0, beyond={"memory": 2.0, "look-up": 3.0, "width": 0.01},
    columns=("layer", "dense ms", "sparse ms"), rows=(("conv1", 1.5, None),), note="as timed",
)  # fmt: skip


@pytest.fixture
def builds(monkeypatch):
    found = FakeBuilds()
    monkeypatch.setattr(running, "layers_of", no_layers)
    monkeypatch.setattr(Builder, "build", lambda self, subject, target: found(self, subject, target))
    return found


def measure(folder, suite=None, selection=ALL, poll=lambda: None):
    suite = suite or small()
    with opened(folder, suite) as found:
        new = run(suite, found, selection, poll=poll)
        return new, found.records


def keys(records):
    return [(r.network, r.subject, r.target, r.batch) for r in records]


def test_every_network_form_and_batch_gets_one_record_beside_its_dense_network(tmp_path, builds):
    new, records = measure(tmp_path)
    assert new == 10
    assert keys(records) == [
        *(("first", s, "cpu", b) for b in (1, 4) for s in ("dense", "half", "odd")),
        *(("second", s, "cpu", b) for b in (1, 4) for s in ("dense", "half")),
    ]
    assert all(r.timed and r.baseline == "dense" for r in records)
    assert len({r.run_id for r in records}) == 4, "a run is one network, target and batch"
    half = records[1]
    assert (half.form, half.precision, half.macs, half.parameters) == ("channels, multiples of 8", "fp32", 25_000, 2500)
    assert half.sparsity == pytest.approx(0.75)
    assert (records[0].form, records[0].sparsity) == ("dense", 0.0)
    assert half.conditions.interleaved_with == ("dense", "odd")
    assert half.conditions.duration_s == 0.005


def test_what_is_recorded_is_not_measured_again(tmp_path, builds):
    _, before = measure(tmp_path)
    builds.asked.clear()
    new, after = measure(tmp_path)
    assert new == 0
    assert after == before
    assert builds.asked == []


def test_a_stopped_run_goes_on_where_it_was(tmp_path, builds):
    class Stop(Interrupted):
        def __init__(self):
            super().__init__("stopped", signal_number=15, fix="again")

    def poll():
        if ("second", "dense", "cpu") in builds.asked:
            raise Stop

    with pytest.raises(Stop):
        measure(tmp_path, poll=poll)
    builds.asked.clear()
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    new, records = measure(tmp_path)
    assert (new, len(records)) == (4, 10)
    assert (tmp_path / "records.jsonl").read_text().splitlines()[:6] == lines, "records are only ever added"
    assert [network for network, *_ in builds.asked] == ["second"] * 2


def test_batches_and_forms_asked_for_later_are_added(tmp_path, builds):
    measure(tmp_path, selection=Selection(batches=(1,), only=("first/half",)))
    _, records = measure(tmp_path, selection=Selection(only=("first",)))
    assert keys(records) == [
        *(("first", s, "cpu", 1) for s in ("dense", "half")),
        *(("first", s, "cpu", 1) for s in ("dense", "odd")),
        *(("first", s, "cpu", 4) for s in ("dense", "half", "odd")),
    ]


def test_a_form_that_cannot_be_built_is_recorded_and_the_rest_goes_on(tmp_path, builds):
    builds.failing["odd"] = SurgeryError("no channel can go", expected="some", fix="none")
    new, records = measure(tmp_path)
    assert new == 9
    (untimed,) = [r for r in records if not r.timed]
    assert (untimed.network, untimed.subject, untimed.batch) == ("first", "odd", 1)
    assert (untimed.status, untimed.reason) == ("not built", "no channel can go")
    assert untimed.run_id == records[0].run_id
    builds.asked.clear()
    assert measure(tmp_path)[0] == 0
    assert builds.asked == []


def test_without_its_dense_network_nothing_of_a_network_is_timed(tmp_path, builds):
    builds.failing["dense"] = RuntimeError("out of memory")
    _, records = measure(tmp_path)
    assert [(r.network, r.subject) for r in records] == [
        ("first", "dense"), ("first", "half"), ("first", "odd"), ("second", "dense"), ("second", "half")
    ]  # fmt: skip
    assert {(r.status, r.reason) for r in records} == {("not built", "RuntimeError: out of memory (the dense network)")}


def test_a_form_that_does_not_run_leaves_the_others_their_times(tmp_path, builds):
    builds.broken.add("odd")
    _, records = measure(tmp_path, selection=Selection(batches=(1,), only=("first",)))
    found = {r.subject: r for r in records}
    assert found["half"].timed
    assert found["odd"].status == "compiled, not timed here"
    assert found["odd"].reason == "did not run: first-odd is broken"


def test_engines_that_do_not_run_here_are_recorded_once(tmp_path, builds):
    builds.reason = "compiled, not timed here: no NVIDIA GPU"
    _, records = measure(tmp_path, selection=Selection(only=("first",)))
    assert keys(records) == [("first", s, "cpu", 1) for s in ("dense", "half", "odd")]
    assert {(r.status, r.reason) for r in records} == {("compiled, not timed here", "no NVIDIA GPU")}
    assert measure(tmp_path, selection=Selection(only=("first",)))[0] == 0


def test_layers_of_chosen_forms_are_timed_once(tmp_path, builds, monkeypatch):
    calls = []

    def fake(network, subject, engines, batch, seconds, poll):
        calls.append((network, subject, [e.name for e in engines], batch, seconds))
        return LAYERS.model_copy(update={"network": network, "subject": subject, "batch": batch})

    monkeypatch.setattr(running, "layers_of", fake)
    suite = small(
        networks=[{"name": "first", "network": "resnet_digits", "forms": ["half", "odd"], "layer_tables": ["odd"]}]
    )
    measure(tmp_path, suite)
    assert calls == [("first", "odd", ["first-dense", "first-odd"], 1, 0.005)]
    with opened(tmp_path, suite) as folder:
        assert list(folder.layers) == [("first", "odd", "cpu")]
        assert folder.layers["first", "odd", "cpu"].table.rows == (("conv1", 1.5, None),)


def test_a_runtime_without_times_of_layers_loses_only_the_table(tmp_path, builds):
    suite = small(networks=[{"name": "first", "network": "resnet_digits", "forms": ["half"], "layer_tables": ["half"]}])
    with opened(tmp_path, suite) as folder:
        said = []
        assert run(suite, folder, ALL, say=said.append) == 4
        assert folder.layers == {}
    assert "first, cpu: half has no times of layers: no times of layers" in said


def test_a_changed_suite_is_refused_with_the_differences(tmp_path, builds):
    measure(tmp_path, selection=Selection(batches=(1,), only=("second",)))
    with pytest.raises(RunError) as caught:
        measure(tmp_path, small(seconds=2.0, forms={"half": {"keep": 0.4}}))
    assert caught.value.given == f"{tmp_path} holds another suite: forms.half.keep: 0.5 -> 0.4; seconds: 0.005 -> 2.0"
    assert "--out DIR" in caught.value.fix


def test_new_forms_and_networks_are_measured_into_the_folder_that_there_is(tmp_path, builds):
    first = {"name": "first", "network": "resnet_digits", "forms": ["half"]}
    less = small(networks=[first]).model_copy(update={"forms": {"half": small().forms["half"]}})
    assert measure(tmp_path, less)[0] == 4
    assert measure(tmp_path)[0] == 8, "odd beside dense, and the second network"
    assert set(read_json(tmp_path / "suite.json")["measured"]["forms"]) == {"half", "odd"}
    assert measure(tmp_path, less)[0] == 0, "a suite may name less than the folder holds"
    with pytest.raises(RunError, match=r"forms\.odd\.keep: 0\.7 -> 0\.6"):
        measure(tmp_path, small(forms={"odd": {"keep": 0.6}}))


def test_another_machine_is_refused_with_the_differences(tmp_path, builds):
    measure(tmp_path, selection=Selection(batches=(1,), only=("second",)))
    state = read_json(tmp_path / "suite.json")
    state["machine"]["onnxruntime"] = "0.1"
    (tmp_path / "suite.json").write_text(json.dumps(state))
    with pytest.raises(RunError) as caught:
        measure(tmp_path)
    assert "measurements of another machine or of other versions: onnxruntime: 0.1 -> " in caught.value.given


def test_a_changed_target_of_the_same_name_is_refused(tmp_path, builds):
    folder, one, two = tmp_path / "run", tmp_path / "mine.toml", tmp_path / "other" / "mine.toml"
    two.parent.mkdir()
    one.write_text('inherits = "cpu"\n')
    two.write_text('inherits = "cpu"\nwidth_multiple = 8\n')
    only = {"batches": (1,), "only": ("second",)}
    measure(folder, selection=Selection((str(one),), **only))
    with pytest.raises(RunError) as caught:
        measure(folder, selection=Selection((str(two),), **only))
    assert "holds records of another target 'mine'" in caught.value.given


def test_one_process_at_a_time_measures_in_a_folder(tmp_path, builds):
    with opened(tmp_path, small()), pytest.raises(RunError) as caught, opened(tmp_path, small()):
        pass
    assert "another process is measuring in" in caught.value.given


def test_a_folder_with_something_else_is_left_alone(tmp_path, builds):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(Exception, match="something else than a suite's run"):
        measure(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["subjects.jsonl", "layers.jsonl"])
def test_a_damaged_file_is_named_with_its_line(tmp_path, builds, name):
    measure(tmp_path, selection=Selection(batches=(1,), only=("second",)))
    (tmp_path / name).write_text('{"network": 1}\n')
    with opened(tmp_path, small()) as folder, pytest.raises(ArtifactError) as caught:
        write_suite_report(folder, small())
    assert f"{tmp_path / name}, line 1: " in caught.value.given


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ConfigError) as caught:
        groups(small(), Selection(only=("third*",)), (load_target("cpu"),), ())
    assert caught.value.given == "--only 'third*' matches nothing in the suite 'small'"
    assert "first, second" in caught.value.expected


def test_a_batch_that_a_target_does_not_take_is_refused():
    with pytest.raises(ConfigError) as caught:
        groups(small(), Selection(batches=(1000,)), (load_target("cpu"),), ())
    assert caught.value.given == "batch 1000, which target 'cpu' does not take"


def test_targets_are_taken_in_the_precisions_that_they_have():
    suite = small(precisions=["fp32", "fp16", "fp8"], targets=["cpu", "torch-cpu"])
    assert [t.name for t in selected_targets(suite, ALL)] == ["cpu", "cpu-fp16", "torch-cpu", "torch-cpu-fp16"]
    with pytest.raises(ConfigError, match="fp8"):
        selected_targets(small(precisions=["fp8"]), ALL)


@pytest.mark.parametrize(("target", "cache", "graph"), [("cpu", "cold", False), ("rtx-sm89", "warm", True)])
def test_caches_are_a_processors_and_graphs_a_gpus(target, cache, graph):
    suite = small(cache="cold", cuda_graph=True, transfers="included")
    assert running._way(suite, load_target(target)) == {"transfers": "included", "cache": cache, "cuda_graph": graph}


def test_the_way_of_timing_reaches_the_records(tmp_path, builds):
    cpus = tuple(sorted(os.sched_getaffinity(0))[:1])
    suite = small(transfers="included")
    _, records = measure(tmp_path, suite, Selection(batches=(1,), only=("second",), cpus=cpus))
    assert {(r.conditions.transfers, r.conditions.cpus) for r in records} == {("included", str(cpus[0]))}


def test_short_suites_still_have_enough_blocks_for_an_interval():
    assert running._floors(small())["block_ms"] == pytest.approx(5 / running.BLOCKS)
    assert running._floors(small(seconds=2.0))["block_ms"] == 50.0
