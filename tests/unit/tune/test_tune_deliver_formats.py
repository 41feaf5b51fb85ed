"""Delivery in a chosen format: packed layers on the way to engines, a format by timing, and what was there before."""

import pytest
import torch
from torch import nn

from deploy_sparse.artifact import read_json
from deploy_sparse.engine import _trt
from deploy_sparse.engine.target import load_target
from deploy_sparse.errors import ArtifactError, ConfigError, MissingDependencyError
from deploy_sparse.surgery import SurgeryPlan, compact
from deploy_sparse.ticket import ModelRef, Provenance, Ticket
from deploy_sparse.tune import deliver as module
from deploy_sparse.tune import formats
from deploy_sparse.tune.deliver import DeployConfig, check_deploy, deliver
from deploy_sparse.tune.formats import Choice, NetworkTime

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


def run(folder, format, **options):
    dense, ticket = tickets()
    said = []
    config = DeployConfig(targets=("cpu",), batches=(1,), duration_s=0.05, format=format, **options)
    result = deliver(
        dense=dense, ticket=ticket, factory=network, example_inputs=(X,), evaluate=lambda predict: 0.5, folder=folder,
        config=config, title="a title", say=said.append,
    )  # fmt: skip
    return result, said


def chosen(name):
    """A planner that takes the format of that name without timing anything."""

    def choose_format(ticket, factory, target, example_inputs, *, batch, **options):
        assert (target.name, batch) == ("cpu", target.batch.opt)
        made = compact(ticket, factory, example_inputs, format=name)
        return made, Choice(name, "cpu", batch, (), (NetworkTime(name, 1, 1.5, 1.4, 1.6),))

    return choose_format


def test_a_packed_network_is_exported_built_timed_and_reported(tmp_path):
    result, _ = run(tmp_path, "packed")
    assert {row[0] for row in result["timed"]["rows"]} == {"dense", "ticket"}
    plan = SurgeryPlan.load(tmp_path / "compact")
    assert plan.shape.packed == {"2"}
    assert "1 layer of blocks: 1 equal" in (tmp_path / "report.md").read_text()
    nodes = _node_kinds(tmp_path / "onnx" / "ticket.onnx")
    assert nodes.count("Conv") == 2
    assert nodes.count("Gather") <= 2
    before = read_json(tmp_path / "compact" / "plan.json")["digest"]
    again, _ = run(tmp_path, "packed")
    assert again == result
    assert read_json(tmp_path / "compact" / "plan.json")["digest"] == before


def test_what_the_planner_chose_is_deployed_and_not_chosen_again(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "choose_format", chosen("packed"))
    _, said = run(tmp_path, "auto")
    assert "chosen for cpu at batch" in "\n".join(said)
    assert "packed: 1.50x as fast as dense" in "\n".join(said)
    assert SurgeryPlan.load(tmp_path / "compact").shape.packed == {"2"}
    monkeypatch.setattr(module, "choose_format", lambda *_, **__: pytest.fail("chosen again"))
    run(tmp_path, "auto")


def _node_kinds(path):
    import onnx

    return [node.op_type for node in onnx.load(str(path)).graph.node]


def saved(folder, format):
    """An earlier result in a run's folder."""
    made = compact(tickets()[1], network, (X,), format=format, multiple=load_target("cpu").width_multiple)
    made.save(folder / "compact", program=False)


@pytest.mark.parametrize(
    ("before", "now", "what"),
    [
        ("packed", "channels", "layers are packed"),
        ("packed", "dense", "layers are packed"),
        ("channels", "dense", "channels are cut"),
    ],
)
def test_an_earlier_result_in_another_format_is_refused(tmp_path, before, now, what):
    saved(tmp_path, before)
    with pytest.raises(ArtifactError, match=rf"{what}[\s\S]*format '{now}'[\s\S]*remove .*compact"):
        run(tmp_path, now)


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
    if _trt.local_gpu() is None:
        with pytest.raises(ConfigError, match=r"'rtx-sm89' cannot be timed here: .*no NVIDIA GPU"):
            check_deploy(DeployConfig(targets=("rtx-sm89", "cpu"), batches=(1,), format="auto"))
    check_deploy(DeployConfig(targets=("cpu", "rtx-sm89"), batches=(1,), format="auto"))
    check_deploy(DeployConfig(targets=("rtx-sm89", "cpu"), batches=(1,), format="packed"))


def test_a_format_by_timing_needs_the_first_targets_library(monkeypatch):
    def missing(runtime):
        raise MissingDependencyError("tensorrt_rtx is not installed", expected="it", fix="pip install tensorrt-rtx")

    monkeypatch.setattr(_trt, "library", missing)
    with pytest.raises(MissingDependencyError, match="tensorrt_rtx is not installed"):
        check_deploy(DeployConfig(targets=("rtx-sm89", "cpu"), batches=(1,), format="auto"))


def test_timing_is_possible_on_the_cpu(monkeypatch):
    monkeypatch.setattr(formats, "build_engine", lambda *_, **__: pytest.fail("nothing to try"))
    formats.require_timing(load_target("cpu"))
