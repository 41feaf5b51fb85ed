"""Delivery in a chosen format: packed layers on the way to engines, a format by timing, and what was there before."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from deploy_sparse.artifact import read_json
from deploy_sparse.engine.target import load_target
from deploy_sparse.engine.trt import bindings as trt_bindings
from deploy_sparse.errors import ArtifactError, ConfigError, Interrupted, MissingDependencyError
from deploy_sparse.surgery import SurgeryPlan, compact
from deploy_sparse.ticket import ModelRef, Provenance, Ticket
from deploy_sparse.tune import deliver as module
from deploy_sparse.tune import formats
from deploy_sparse.tune.choice import Choice, NetworkTime, planned_for
from deploy_sparse.tune.deliver import DeployConfig, check_deploy, deliver

X = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3))


def tickets():
    """The ticket has two blocks, which read 24 of the first layer's 32 channels."""
    weights = network().state_dict()
    mask, rows = torch.zeros(32, 32, 3, 3, dtype=torch.bool), torch.arange(32)
    mask[(rows % 2 == 0).nonzero(), :14] = mask[(rows % 2 == 1).nonzero(), 11:24] = True
    reference = ModelRef("user factory", input_shape=(1, 6, 6))
    return Ticket(weights, {}, reference, Provenance("dense")), Ticket(
        weights, {"2.weight": mask}, reference, Provenance("by hand")
    )


def run(folder, format, *, target="cpu", batches=(1,), poll=lambda: None, **options):
    dense, ticket = tickets()
    said = []
    config = DeployConfig(targets=(target,), batches=batches, duration_s=0.05, format=format, **options)
    result = deliver(
        dense=dense, ticket=ticket, factory=network, example_inputs=(X,), evaluate=lambda predict: 0.5, folder=folder,
        config=config, title="a title", say=said.append, poll=poll,
    )  # fmt: skip
    return result, said


def chosen(name):
    """A planner that takes the format of that name without timing anything, and a list of what it was asked."""
    asked = []

    def choose_format(ticket, factory, target, example_inputs, *, batch, align, **options):
        asked.append({"target": target.name, "batch": batch, "align": align, **options})
        made = compact(ticket, factory, example_inputs, format=name)
        plan = replace(made.plan, format="auto", target=planned_for(target, batch, align))
        choice = Choice(name, "cpu", batch[0], (), (NetworkTime(name, 1, 1.5, 1.4, 1.6),), others=batch[1:])
        return replace(made, plan=plan), choice

    return choose_format, asked


def test_a_packed_network_is_exported_built_timed_and_reported(tmp_path):
    result, _ = run(tmp_path, "packed")
    assert {row[0] for row in result["timed"]["rows"]} == {"dense", "ticket"}
    plan = SurgeryPlan.load(tmp_path / "compact")
    assert (plan.shape.packed, plan.format) == ({"2"}, "packed")
    assert "1 layer of blocks: 1 equal" in (tmp_path / "report.md").read_text()
    nodes = _node_kinds(tmp_path / "onnx" / "ticket.onnx")
    assert nodes.count("Conv") == 2
    assert nodes.count("Gather") <= 2
    before = read_json(tmp_path / "compact" / "plan.json")["digest"]
    again, _ = run(tmp_path, "packed")
    assert again == result
    assert read_json(tmp_path / "compact" / "plan.json")["digest"] == before


def test_pytorch_runs_what_is_delivered_to_it(tmp_path):
    result, _ = run(tmp_path, "packed", target="torch-cpu")
    assert {row[:2] for row in map(tuple, result["timed"]["rows"])} == {("dense", "torch-cpu"), ("ticket", "torch-cpu")}
    assert len(list((tmp_path / "engines").glob("*-torch-cpu-*/model.pt2"))) == 2
    again, _ = run(tmp_path, "packed", target="torch-cpu")
    assert again == result  # nothing was timed again


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """(folder, what the planner was asked, the lines said) of a delivery for which the planner took the packed network."""
    folder, (choose_format, asked) = tmp_path_factory.mktemp("planned"), chosen("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "choose_format", choose_format)
        _, said = run(folder, "auto")
    return folder, asked, said


def test_what_the_planner_chose_is_deployed_and_not_chosen_again(planned, monkeypatch):
    folder, asked, said = planned
    assert len(asked) == 1
    assert "chosen for cpu at batch" in "\n".join(said)
    assert "packed: 1.50x as fast as dense" in "\n".join(said)
    assert SurgeryPlan.load(folder / "compact").shape.packed == {"2"}
    monkeypatch.setattr(module, "choose_format", lambda *_, **__: pytest.fail("chosen again"))
    run(folder, "auto")


def _node_kinds(path):
    import onnx

    return [node.op_type for node in onnx.load(str(path)).graph.node]


def test_the_planner_is_told_how_the_run_deploys_and_times(tmp_path, monkeypatch):
    choose_format, asked = chosen("dense")
    monkeypatch.setattr(module, "choose_format", choose_format)
    monkeypatch.setenv("DEPLOY_SPARSE_LAYER_TIMES", str(tmp_path / "times"))
    polled = []
    run(tmp_path / "run", "auto", batches=(2, 1), align=False, poll=lambda: polled.append(1))
    (told,) = asked
    before = len(polled)
    told.pop("poll")()
    assert len(polled) == before + 1
    assert callable(told.pop("say"))
    assert told == {
        "target": "cpu", "batch": (2, 1), "align": False, "duration_s": 0.05, "cache": tmp_path / "times",
    }  # fmt: skip


def test_a_stop_while_planning_ends_the_run_before_anything_is_kept(tmp_path):
    calls = []

    def poll():
        calls.append(1)
        if len(calls) == 2:
            raise Interrupted("stopped", signal_number=15, fix="go on")

    with pytest.raises(Interrupted):
        run(tmp_path, "auto", poll=poll)
    assert not (tmp_path / "compact").exists()


def saved(folder, made_as, **said):
    """An earlier result in a run's folder; without ``said``, by a version that said nothing."""
    made = compact(tickets()[1], network, (X,), format=made_as, multiple=load_target("cpu").width_multiple)
    replace(made, plan=replace(made.plan, **said)).save(folder / "compact", program=False)


def dense_uncut(folder):
    """Nothing tells it from whole channels where none is cut and widths are as they are."""
    made = compact(tickets()[0], network, (X,), format="dense")
    replace(made, plan=replace(made.plan, format="dense", ticket=tickets()[1].hash)).save(
        folder / "compact", program=False
    )


@pytest.mark.parametrize(
    ("before", "said", "now", "what"),
    [
        ("packed", {}, "channels", "'packed'"),
        ("packed", {}, "dense", "'packed'"),
        ("channels", {}, "dense", "'channels'"),
        ("channels", {}, "packed", "'channels'"),
        ("channels", {"format": "channels"}, "packed", "'channels'"),
        ("channels", {"format": "channels"}, "auto", "'channels'"),
        ("packed", {"format": "auto", "target": "cpu at batch 1"}, "packed", "'auto'"),
        ("packed", {}, "auto", "'packed'"),
    ],
)
def test_an_earlier_result_in_another_format_is_refused(tmp_path, before, said, now, what):
    saved(tmp_path, before, **said)
    with pytest.raises(ArtifactError, match=rf"in the format {what}[\s\S]*format '{now}'[\s\S]*remove .*compact"):
        run(tmp_path, now)


def test_dense_does_not_pass_for_channels_where_none_was_cut(tmp_path):
    dense_uncut(tmp_path)
    with pytest.raises(ArtifactError, match=r"in the format 'dense'[\s\S]*format 'channels'"):
        run(tmp_path, "channels", align=False)


def test_an_earlier_result_that_says_nothing_is_of_channels(tmp_path):
    saved(tmp_path, "channels", format="")
    assert SurgeryPlan.load(tmp_path / "compact").format == ""
    run(tmp_path, "channels")


def test_plans_of_earlier_versions_are_read():
    body = compact(tickets()[1], network, (X,)).plan.to_json()
    assert (
        SurgeryPlan.from_json({key: value for key, value in body.items() if key not in ("format", "target")}).format
        == ""
    )
    read = SurgeryPlan.from_json(body | {"format": "auto", "target": "cpu at batch 1"})
    assert (read.format, read.target) == ("auto", "cpu at batch 1")


def test_the_plan_says_that_it_is_dense(tmp_path):
    run(tmp_path, "dense")
    plan = SurgeryPlan.load(tmp_path / "compact")
    assert (plan.format, plan.target) == ("dense", "")


def test_a_choice_for_something_else_is_refused(planned, tmp_path):
    folder = planned[0]
    assert SurgeryPlan.load(folder / "compact").format == "auto"
    file = tmp_path / "cpu.toml"
    file.write_text('name = "cpu"\nruntime = "onnxruntime"\nthreads = 2\n')
    for change, what in (
        ({"batches": (2,)}, "at batch 2"),
        ({"batches": (1, 2)}, "at batches 1, 2"),
        ({"align": False}, "at batch 1, widths not rounded up"),
        ({"target": str(file)}, "at batch 1"),
    ):
        expected = rf"was chosen for cpu \(\w+\) at batch 1\n.*the choice for cpu \(\w+\) {what}\n.*remove .*compact"
        with pytest.raises(ArtifactError, match=expected):
            run(folder, "auto", **change)


def test_an_earlier_result_of_another_ticket_is_refused_by_the_planner_too(tmp_path):
    dense, _ = tickets()
    compact(dense, network, (X,), format="dense").save(tmp_path / "compact", program=False)
    with pytest.raises(ArtifactError, match="was made from ticket"):
        run(tmp_path, "auto")


@pytest.mark.parametrize("format", ["auto", "dense", "channels", "packed"])
def test_every_format_is_a_setting(format):
    check_deploy(DeployConfig(format=format))


def test_unknown_formats_are_refused():
    with pytest.raises(ValueError, match="'auto', 'dense', 'channels' or 'packed'"):
        DeployConfig(format="blocks")


def test_a_format_by_timing_on_a_target_that_does_not_run_here_is_refused_before_training(monkeypatch):
    """A library that is missing is named as such; else it is the machine."""
    pytest.importorskip("tensorrt_rtx")
    if trt_bindings.local_gpu() is None:
        with pytest.raises(ConfigError, match=r"'rtx-sm89' cannot be timed here: .*no NVIDIA GPU"):
            check_deploy(DeployConfig(targets=("rtx-sm89", "cpu"), batches=(1,), format="auto"))
    check_deploy(DeployConfig(targets=("cpu", "rtx-sm89"), batches=(1,), format="auto"))
    check_deploy(DeployConfig(targets=("rtx-sm89", "cpu"), batches=(1,), format="packed"))


def test_a_format_by_timing_needs_the_first_targets_library(monkeypatch):
    def missing(runtime):
        raise MissingDependencyError("tensorrt_rtx is not installed", expected="it", fix="pip install tensorrt-rtx")

    monkeypatch.setattr(trt_bindings, "library", missing)
    with pytest.raises(MissingDependencyError, match="tensorrt_rtx is not installed"):
        check_deploy(DeployConfig(targets=("rtx-sm89", "cpu"), batches=(1,), format="auto"))


def test_timing_is_possible_on_the_cpu(monkeypatch):
    monkeypatch.setattr(formats, "build_engine", lambda *_, **__: pytest.fail("nothing to try"))
    formats.require_timing(load_target("cpu"))
