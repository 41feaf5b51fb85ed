"""``compact --format`` and its Python twin: what is written, shown and refused."""

import json

import pytest
import torch

import deploy_sparse
from deploy_sparse import api, zoo
from deploy_sparse.cli.main import main
from deploy_sparse.engine.target import load_target
from deploy_sparse.engine.trt import bindings as trt_bindings
from deploy_sparse.errors import ConfigError
from deploy_sparse.surgery import SurgeryPlan
from deploy_sparse.surgery.packed import PackedConv2d
from deploy_sparse.ticket import ModelRef, Provenance, Ticket
from deploy_sparse.tune.choice import Choice, NetworkTime

ARGUMENTS = {"widths": [32, 32, 32]}


def run(capsys, *words):
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def made():
    """Two blocks in one layer of a small network."""
    torch.manual_seed(0)
    weights = zoo.build("resnet_digits", **ARGUMENTS).state_dict()
    name = next(name for name, weight in weights.items() if tuple(weight.shape) == (32, 32, 3, 3))
    mask = torch.zeros(32, 32, 3, 3, dtype=torch.bool)
    mask[:16, :16] = mask[16:, 16:] = True
    return Ticket(weights, {name: mask}, ModelRef("resnet_digits", ARGUMENTS, (1, 8, 8)), Provenance("test"))


@pytest.fixture
def ticket(made, tmp_path):
    return str(made.save(tmp_path / "ticket"))


def test_packed_is_written_shown_inspected_and_loaded(capsys, ticket, tmp_path):
    out = str(tmp_path / "packed")
    code, text, _ = run(capsys, "compact", ticket, "--format", "packed", "--out", out)
    assert code == 0
    assert "1 layer of blocks: 1 disjoint; no look-up" in text
    assert "1 layer of blocks: 1 disjoint; no look-up" in run(capsys, "show", out)[1]
    assert "1 layer of blocks: 1 disjoint; no look-up" in run(capsys, "inspect", out)[1]
    network = deploy_sparse.load_compact(out)
    assert [type(part) for part in network.modules()].count(PackedConv2d) == 1
    with torch.no_grad():
        x = torch.randn(3, 1, 8, 8)
        torch.testing.assert_close(deploy_sparse.load_program(out)(x), network(x))


@pytest.mark.parametrize("format", ["dense", "channels"])
def test_other_formats_pack_nothing(capsys, ticket, tmp_path, format):
    out = tmp_path / format
    words = ("compact", ticket, "--format", format, "--out", str(out), "--no-program", "--json")
    code, text, _ = run(capsys, *words)
    assert code == 0
    assert json.loads(text)["macs"]["before"] == json.loads(text)["macs"]["after"]
    assert SurgeryPlan.load(out).shape.packs == ()


def test_auto_times_on_the_target_and_says_what_was_chosen(capsys, ticket, made, tmp_path, monkeypatch):
    """What the planner does is tested where it lives; here it answers at once."""

    def choose_format(ticket, factory, target, example_inputs=None, **options):
        assert target.name == "cpu"
        assert options == {"batch": [1, 32], "norms": "leave", "shortcuts": "spread", "cache": tmp_path / "times"}
        found = api.compact_ticket(ticket, factory, format="packed")
        choice = Choice("packed", "cpu", 1, (), (NetworkTime("packed", 1, 1.5, 1.4, 1.6),))
        from dataclasses import replace

        return replace(found, plan=replace(found.plan, choice=tuple(choice.lines()))), choice

    monkeypatch.setattr(api, "choose_format", choose_format)
    monkeypatch.setenv("DEPLOY_SPARSE_LAYER_TIMES", str(tmp_path / "times"))
    out = str(tmp_path / "auto")
    options = ("--norms", "leave", "--shortcuts", "spread", "--batch", "1", "32", "--no-program")
    code, text, _ = run(capsys, "compact", ticket, "--format", "auto", "--target", "cpu", "--out", out, *options)
    assert code == 0
    for line in ("chosen for cpu at batch 1: packed", "packed: 1.50x as fast as dense"):
        assert line in text
        assert line in run(capsys, "show", out)[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "package"], "format 'package'", ),
        (["--format", "auto"], "format 'auto' without a target"),
        (["--format", "auto", "--target", "gpu"], "unknown target 'gpu'"),
        (["--format", "auto", "--target", "cpu", "--batch", "0"], "the batch sizes are 0"),
        (["--format", "auto", "--target", "cpu", "--batch", "1", "999"], "batch 999, which target 'cpu' does not take"),
        (["--format", "packed", "--batch", "8"], "batch [8] with format 'packed'"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for_is_one_message(capsys, ticket, tmp_path, words, message):
    code, out, err = run(capsys, "compact", ticket, "--out", str(tmp_path / "x"), *words)
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "x").exists()


def test_python_refuses_the_same(made):
    with pytest.raises(ConfigError) as caught:
        deploy_sparse.compact(made, format="package")
    for part in ("format 'package'", "auto, dense, channels, packed", "did you mean 'packed'?"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match=r"the target to time on[\s\S]*--target cpu"):
        deploy_sparse.compact(made, format="auto")


def test_the_batch_is_what_the_target_is_tuned_for(made, monkeypatch):
    asked = []

    def choose_format(ticket, factory, target, example_inputs=None, *, batch, **options):
        asked.append(batch)
        return None, None

    monkeypatch.setattr(api, "choose_format", choose_format)
    cpu = load_target("cpu")
    deploy_sparse.compact(made, format="auto", target="cpu")
    deploy_sparse.compact(
        made, format="auto", target=cpu.model_copy(update={"batch": cpu.batch.model_copy(update={"opt": 8})})
    )
    deploy_sparse.compact(made, format="auto", target="cpu", batch=(4, 2))
    assert asked == [1, 8, (4, 2)]
    with pytest.raises(ConfigError, match=r"batch 2 with format 'channels'[\s\S]*format 'auto' only"):
        deploy_sparse.compact(made, batch=2)


def test_a_target_that_does_not_run_here_is_refused(made):
    pytest.importorskip("tensorrt_rtx")
    if trt_bindings.local_gpu() is not None:
        pytest.skip("a GPU is here")
    with pytest.raises(ConfigError, match="'rtx-sm89' cannot be timed here"):
        deploy_sparse.compact(made, format="auto", target="rtx-sm89")
