"""`inspect`: what surgery cuts, what stays and why; of a ticket without writing anything."""

import json
import sys

import pytest
import torch

from deploy_sparse import Ticket, compact, zoo
from deploy_sparse.cli.main import main
from deploy_sparse.errors import ExportError
from deploy_sparse.ticket import ModelRef, Provenance

REFERENCE = ModelRef("resnet_digits", {"widths": [4, 4, 4]}, (1, 8, 8))


def run(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def made():
    """A ticket without channel 2 of the first block's inner convolution, bias and norm included."""
    torch.manual_seed(0)
    model = zoo.build("resnet_digits", widths=(4, 4, 4))
    conv, norm = inner_names(model)
    masks = {name: torch.ones_like(model.get_parameter(name), dtype=torch.bool) for name in (conv, *norm)}
    for mask in masks.values():
        mask[2] = False
    return Ticket(model.state_dict(), masks, REFERENCE, Provenance("test")), conv, norm


def inner_names(model):
    from deploy_sparse.surgery.graph import channel_groups

    group = next(
        g
        for g in channel_groups(model.eval(), (torch.zeros(2, 1, 8, 8),))
        if g.pinned is None and len(g.producers) == 1
    )
    producer = group.producers[0]
    return producer.weight.name, [norm.name for norm in producer.norms]


@pytest.fixture(scope="module")
def folders(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    made[0].save(folder / "ticket")
    compact(made[0]).save(folder / "compact")
    return folder


def group_of(value, name):
    return next(group for group in value["groups"] if group["name"] == name)


@pytest.mark.parametrize("subject", ["ticket", "compact"])
def test_json_tells_layers_groups_and_members(capsys, folders, made, subject):
    code, out, _ = run(capsys, "inspect", folders / subject, "--json")
    value = json.loads(out)
    assert code == 0
    assert value["dry_run"] is (subject == "ticket")
    assert (value["parity"] is None) is (subject == "ticket")
    assert value["ticket"] == made[0].hash
    group = group_of(value, made[1])
    assert (group["size"], group["kept"]) == (4, 3)
    assert {made[1], *made[2]} <= set(group["members"])
    layer = next(layer for layer in value["layers"] if layer["name"] == made[1])
    assert (layer["dense"][0], layer["compact"][0]) == (4, 3)


@pytest.mark.parametrize("subject", ["ticket", "compact"])
def test_text_holds_both_tables_and_the_reasons(capsys, folders, made, subject):
    code, out, _ = run(capsys, "inspect", folders / subject)
    assert code == 0
    lines = out.splitlines()
    assert any(line.startswith("weight") and "compact" in line for line in lines)
    assert any(line.startswith("channel group") and "members" in line for line in lines)
    assert any("10 pinned: " in line for line in lines)  # the classes, which no note mentions
    assert "parameters" in out
    assert any(line.split() == ["ticket", made[0].hash] for line in lines)
    assert ("planned only: deploy-sparse compact" in out) is (subject == "ticket")
    assert ("top-1 agreement" in out) is (subject == "compact")


def test_a_dry_run_writes_nothing_and_knows_targets(capsys, folders, made):
    before = sorted(folders.rglob("*"))
    code, out, _ = run(capsys, "inspect", folders / "ticket", "--target", "rtx-sm89", "--json")
    value = json.loads(out)
    assert code == 0
    assert value["multiple"] == 8
    assert group_of(value, made[1])["kept"] == 4
    assert sorted(folders.rglob("*")) == before


class Options:
    """What a plan was asked for."""

    def __init__(self, monkeypatch):
        from deploy_sparse.surgery import graph, plan

        self.plans, self.groups = [], []
        decide, groups = plan.plan_from_ticket, graph.channel_groups
        monkeypatch.setattr(
            plan, "plan_from_ticket", lambda *given, **asked: (self.plans.append(asked), decide(*given, **asked))[1]
        )
        monkeypatch.setattr(
            graph, "channel_groups", lambda *given, **asked: (self.groups.append(asked), groups(*given, **asked))[1]
        )


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ((), {"norms": "exact", "shortcuts": "union"}),
        (("--norms", "leave"), {"norms": "leave", "shortcuts": "union"}),
        (("--shortcuts", "spread"), {"norms": "exact", "shortcuts": "spread"}),
    ],
    ids=["default", "norms", "shortcuts"],
)
def test_a_dry_run_takes_the_options_of_compact(capsys, folders, monkeypatch, words, asked):
    seen = Options(monkeypatch)
    code, out, _ = run(capsys, "inspect", folders / "ticket", "--json", *words)
    assert code == 0
    assert json.loads(out)["dry_run"] is True
    assert [{key: plan[key] for key in asked} for plan in seen.plans] == [asked]
    assert seen.groups == [{"norms": asked["norms"] == "exact"}]


@pytest.mark.parametrize("option", ["--target", "--norms", "--shortcuts"])
def test_options_of_a_plan_that_was_made_are_refused(capsys, folders, option):
    code, _, err = run(capsys, "inspect", folders / "compact", option, "leave")
    assert code == 2
    assert f"{option} leave for a compact network, whose widths are decided" in err
    assert f"leave {option} out, or inspect the ticket" in err


@pytest.mark.parametrize("option", ["norms", "shortcuts"])
def test_options_that_there_are_not_are_refused(capsys, folders, option):
    code, _, err = run(capsys, "inspect", folders / "ticket", f"--{option}", "none")
    assert code == 2
    assert f"{option}='none'" in err


def test_a_run_means_its_compact_network_or_else_its_ticket(capsys, folders, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "ticket").symlink_to(folders / "ticket")
    assert json.loads(run(capsys, "inspect", tmp_path, "--json")[1])["dry_run"] is True
    (tmp_path / "compact").symlink_to(folders / "compact")
    value = json.loads(run(capsys, "inspect", tmp_path, "--json")[1])
    assert (value["dry_run"], value["path"]) == (False, str(tmp_path / "compact"))


def test_compact_prints_the_groups_too(capsys, folders, made, tmp_path):
    code, out, _ = run(capsys, "compact", folders / "ticket", "--out", tmp_path / "compact")
    assert code == 0
    assert any(line.startswith("channel group") and "members" not in line for line in out.splitlines())


def test_a_compact_network_of_the_callers_own_has_no_members(capsys, tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[1] = False
    ticket = Ticket(model.state_dict(), {"0.weight": mask}, ModelRef("mine", {}, (3,)), Provenance("test"))
    ticket.save(tmp_path / "ticket")
    factory = lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))  # noqa: E731
    compact(ticket, factory=factory).save(tmp_path / "compact")
    value = json.loads(run(capsys, "inspect", tmp_path / "compact", "--json")[1])
    assert {group["members"] for group in value["groups"]} == {None}
    assert "members" not in run(capsys, "inspect", tmp_path / "compact")[1]
    code, _, err = run(capsys, "inspect", tmp_path / "ticket")
    assert code == 2
    assert "'mine', which is no zoo network" in err
    assert "in Python" in err
    assert "deploy_sparse.surgery.plan_from_ticket(ticket, network, example_inputs)" in err
    code, _, err = run(capsys, "compact", tmp_path / "ticket", "--out", tmp_path / "again")
    assert code == 2
    assert "deploy_sparse.compact(ticket, factory=…) in Python" in err


def test_compact_says_what_it_wrote(capsys, folders, tmp_path, monkeypatch):
    def written(name, *words):
        code, out, _ = run(capsys, "compact", folders / "ticket", "--out", tmp_path / name, *words)
        assert code == 0
        return out, {path.name for path in (tmp_path / name).iterdir()}

    out, files = written("whole")
    assert files == {"plan.json", "compact.safetensors", "compact.pt2"}
    assert out.splitlines()[-1] == f"written to {tmp_path / 'whole'}"
    out, files = written("small", "--no-program", "--json")
    assert files == {"plan.json", "compact.safetensors"}
    assert (json.loads(out)["program"], json.loads(out)["no_program"]) == (False, None)

    def refuse(*_):
        raise ExportError("Net has no torch.export form: it sorts", expected="", fix="")

    monkeypatch.setattr(sys.modules["deploy_sparse.surgery.compact"], "program_bytes", refuse)
    out, files = written("refused")
    assert files == {"plan.json", "compact.safetensors"}
    last = f"written to {tmp_path / 'refused'} without compact.pt2: Net has no torch.export form: it sorts"
    assert out.splitlines()[-1] == last


def test_a_ticket_that_frees_nothing_says_so_first(capsys, made, tmp_path):
    Ticket(made[0].weights, {}, REFERENCE, Provenance("test")).save(tmp_path / "dense")
    out = run(capsys, "compact", tmp_path / "dense", "--out", tmp_path / "compact", "--no-program")[1]
    assert "nothing could be cut: the masks keep every weight" in out.splitlines()


def test_other_paths_are_refused(capsys, folders, tmp_path, made):
    missing = run(capsys, "inspect", tmp_path / "nowhere")[2]
    assert "nowhere does not exist" in missing
    assert "expected: a ticket's folder" in missing
    assert "holds nothing to inspect" in run(capsys, "inspect", tmp_path)[2]
    code, _, err = run(capsys, "inspect", folders / "compact", "--target", "cpu")
    assert code == 2
    assert "whose widths are decided" in err
    shapeless = Ticket(made[0].weights, {}, ModelRef("resnet_digits", {"widths": [4, 4, 4]}), Provenance("test"))
    shapeless.save(tmp_path / "shapeless")
    code, _, err = run(capsys, "inspect", tmp_path / "shapeless")
    assert code == 2
    assert "does not say the shape of one input sample" in err
