"""Delivery: every step done once, what cannot be built is said, nothing gets a made-up time."""

import shutil

import pytest
import torch
from torch import nn

from deploy_sparse.artifact import digest_of, read_json, sha256_file, write_json
from deploy_sparse.engine.trt import bindings as trt_bindings
from deploy_sparse.errors import ArtifactError, ConfigError, Interrupted, MissingDependencyError
from deploy_sparse.measure.line_plot import LinePlot, Series
from deploy_sparse.measure.record import read_records
from deploy_sparse.measure.table import Table
from deploy_sparse.ticket import ModelRef, Provenance, Ticket
from deploy_sparse.tune.deliver import DeployConfig, check_deploy, deliver
from deploy_sparse.tune.run_report import load_report, write_report_files


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )  # fmt: skip


def tickets():
    weights = network().state_dict()
    rows = torch.arange(8) < 4
    masks = {"0.weight": rows.reshape(8, 1, 1, 1).expand(8, 1, 3, 3), "1.weight": rows, "1.bias": rows}
    reference = ModelRef("user factory", input_shape=(1, 6, 6))
    dense = Ticket(weights, {}, reference, Provenance("dense"))
    return dense, Ticket(weights, masks, reference, Provenance("by hand"))


def run(folder, *, targets=("cpu",), evaluate=lambda predict: 0.5, **options):
    dense, ticket = tickets()
    said = []
    result = deliver(
        dense=dense, ticket=ticket, factory=network, example_inputs=(torch.randn(4, 1, 6, 6),), evaluate=evaluate, folder=folder,
        config=DeployConfig(targets=targets, batches=(1, 2), duration_s=0.05), title="a title", say=said.append, **options,
    )  # fmt: skip
    return result, said


IMAGES = torch.randn(600, 1, 6, 6, generator=torch.Generator().manual_seed(0))  # more than the target's largest batch


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(folder, result, what each subject predicts for IMAGES) of a delivery with nothing but the networks."""
    folder, seen = tmp_path_factory.mktemp("plain"), []

    def evaluate(predict):
        seen.append(predict(IMAGES))
        return 0.25

    result, _ = run(folder, evaluate=evaluate)
    return folder, result, seen


@pytest.fixture
def copy(plain, tmp_path):
    """That folder, to change."""
    return shutil.copytree(plain[0], tmp_path / "copy")


def test_the_metric_is_computed_with_the_deployed_engine_in_its_batch_range(plain):
    folder, result, seen = plain
    with torch.no_grad():
        expected = network().eval()(IMAGES)
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-4)
    assert seen[1].shape == (600, 3)
    assert all("25.00 %" in row for row in result["timed"]["rows"])
    assert {record.accuracy for record in read_records(folder / "records.jsonl")} == {0.25}


def test_a_second_delivery_measures_nothing_again_and_gives_the_same_files(plain, copy):
    def content(folder):
        return {p.relative_to(folder): sha256_file(p) for p in folder.rglob("*") if p.is_file()}

    second, _ = run(copy, evaluate=lambda predict: pytest.fail("evaluated again"))
    assert second == {**plain[1], "report": str(copy / "report.html")}
    assert content(copy) == content(plain[0])


def test_a_missing_library_is_listed_and_the_rest_is_delivered(tmp_path, monkeypatch):
    def missing(runtime):
        raise MissingDependencyError(
            "tensorrt_rtx is not installed", expected="it", fix="pip install 'deploy-sparse[rtx]'"
        )

    monkeypatch.setattr(trt_bindings, "library", missing)
    result, said = run(tmp_path, targets=("cpu", "rtx-sm89"))
    assert any("warning: rtx-sm89 is not built: tensorrt_rtx is not installed" in line for line in said)
    assert "pip install" in result["not_built"]["rtx-sm89"]
    assert len(result["timed"]["rows"]) == 4
    assert "Targets not built" in (tmp_path / "report.md").read_text()


def test_compiled_engines_are_listed_without_times(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    if trt_bindings.local_gpu() is not None:
        pytest.skip("a GPU is here: the engines are timed")
    result, _ = run(tmp_path, targets=("cpu", "rtx-sm89"))
    assert {row[1] for row in result["timed"]["rows"]} == {"cpu"}
    assert [row[:2] for row in result["not_timed"]["rows"]] == [["dense", "rtx-sm89"], ["ticket", "rtx-sm89"]]
    untimed = [r for r in read_records(tmp_path / "records.jsonl") if r.target == "rtx-sm89"]
    assert len(untimed) == 2
    assert all(r.stats is None and r.accuracy is None and r.engine_bytes for r in untimed)


CURVES = LinePlot("Density", "epoch", "share", (Series("weights", ((1, 1.0), (2, 0.5), (3, None))),), "A note.")
TABLE = Table("Rounds", ("a",), (("b",),))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """(folder, result, how often the metric was asked for) of a delivery with a table, a plot, a command, no accuracy of dense."""
    folder, judged = tmp_path_factory.mktemp("told"), []

    def evaluate(predict):
        judged.append(predict(torch.zeros(1, 1, 6, 6)))
        return 0.75

    result, _ = run(
        folder,
        evaluate=evaluate,
        tables=(TABLE,),
        plots=[CURVES],
        command="deploy-sparse run x",
        dense_is_trained=False,
    )
    return folder, result, len(judged)


def test_extra_tables_and_the_command_are_in_the_report(told):
    report = load_report(told[0])
    assert [t.title for t in report.tables] == ["Rounds", "Layers before and after surgery"]
    assert ("command", "deploy-sparse run x") in report.conditions


def test_plots_are_stored_and_rendered_again(told, tmp_path):
    report = load_report(told[0])
    assert report.plots == (CURVES,)
    write_report_files(tmp_path, report)
    for name in ("report.md", "report.html"):
        assert (tmp_path / name).read_bytes() == (told[0] / name).read_bytes()
    assert "## Density" in (told[0] / "report.md").read_text()


def test_a_report_without_plots_says_nothing_of_them_and_a_broken_plot_is_refused(copy):
    stored = read_json(copy / "report.json")
    assert "plots" not in stored  # as reports of earlier versions
    assert load_report(copy).plots == ()
    del stored["digest"]
    bad = {
        "title": "t",
        "x_label": "x",
        "y_label": "y",
        "note": "",
        "series": [{"label": "a", "points": [[2, 1], [1, 1]]}],
    }
    for plots in ([bad], [{"title": "t"}]):
        body = {**stored, "plots": plots}
        write_json(copy / "report.json", {**body, "digest": digest_of(body)})
        with pytest.raises(ArtifactError, match="is no report text"):
            load_report(copy)


def test_a_dense_network_that_is_not_trained_is_timed_and_not_judged(told):
    folder, result, judged = told
    assert judged == 1
    columns = result["timed"]["columns"]
    shown = {row[0]: row[columns.index("test accuracy")] for row in result["timed"]["rows"]}
    assert shown == {"dense": "–", "ticket": "75.00 %"}
    records = read_records(folder / "records.jsonl")
    assert {(r.subject, r.accuracy) for r in records} == {("dense", None), ("ticket", 0.75)}
    assert all(r.stats for r in records)
    assert load_report(folder).conditions == (
        ("dense network", "not trained: it stands here for its time only, and its accuracy is not known"),
        ("command", "deploy-sparse run x"),
    )
    page = (folder / "report.html").read_text()
    assert "Not shown, as their accuracy was not given: dense." in page
    assert "it stands here for its time only" in page


def test_a_stop_between_steps_keeps_the_finished_ones(tmp_path):
    calls = []

    def poll():
        calls.append(1)
        if len(calls) == 2:
            raise Interrupted("stopped", signal_number=15, fix="go on")

    with pytest.raises(Interrupted):
        run(tmp_path, poll=poll)
    assert (tmp_path / "compact").exists()
    assert not (tmp_path / "records.jsonl").exists()
    run(tmp_path)
    assert (tmp_path / "report.html").exists()


def test_nothing_that_can_be_built_is_an_error_before_and_after_training(tmp_path, monkeypatch):
    def missing(runtime):
        raise MissingDependencyError("tensorrt_rtx is not installed", expected="it", fix="pip install tensorrt-rtx")

    monkeypatch.setattr(trt_bindings, "library", missing)
    with pytest.raises(MissingDependencyError, match="pip install tensorrt-rtx"):
        check_deploy(DeployConfig(targets=("rtx-sm89",)))
    check_deploy(DeployConfig(targets=("cpu", "rtx-sm89"), batches=(1,)))  # the CPU can
    with pytest.raises(MissingDependencyError):
        run(tmp_path, targets=("rtx-sm89",))


def test_a_name_given_twice_is_refused():
    with pytest.raises(ConfigError, match=r"deploy.batches = \[1, 1\][\s\S]*each one once"):
        check_deploy(DeployConfig(batches=(1, 1)))
    with pytest.raises(ConfigError, match=r"deploy.targets"):
        check_deploy(DeployConfig(targets=("cpu", "cpu")))


def test_unknown_targets_and_batches_outside_the_range_are_refused_early():
    with pytest.raises(ConfigError, match="unknown target 'cpuu'"):
        check_deploy(DeployConfig(targets=("cpuu",)))
    with pytest.raises(ConfigError, match=r"deploy.batches holds 0[\s\S]*batches from 1"):
        check_deploy(DeployConfig(batches=(0,)))


def test_the_dense_network_is_delivered_alone_when_there_is_no_ticket(tmp_path):
    dense, _ = tickets()
    said = []
    result = deliver(
        dense=dense, ticket=None, factory=network, example_inputs=(torch.randn(4, 1, 6, 6),), evaluate=lambda predict: 0.5, folder=tmp_path,
        config=DeployConfig(targets=("cpu",), batches=(1,), duration_s=0.05), title="alone", say=said.append,
    )  # fmt: skip
    assert [row[0] for row in result["timed"]["rows"]] == ["dense"]
    assert result["verdicts"] == []
    assert not (tmp_path / "compact").exists()
    assert [p.name for p in (tmp_path / "onnx").glob("*.onnx")] == ["dense.onnx"]
    assert "nothing to compare" in (tmp_path / "report.md").read_text()
    assert any("dense agrees with its ONNX graph" in line for line in said)
