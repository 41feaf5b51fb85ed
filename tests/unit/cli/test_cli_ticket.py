"""``deploy-sparse ticket``: sources, what is printed and written, and what is refused; the table is a made-up one."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from deploy_sparse import zoo
from deploy_sparse.cli.main import main
from deploy_sparse.surgery.compact import compact
from deploy_sparse.ticket import ModelRef, Provenance, Ticket
from deploy_sparse.tune import budget_table, budget_ticket
from deploy_sparse.tune.budget import Timed
from deploy_sparse.tune.latency.shapes import shapes_of

ARGUMENTS = {"widths": [16, 32, 32]}
WORDS = ("--target", "cpu", "--latency", "0.6x")
NETWORK = ("--network", "resnet_digits", "--arguments", json.dumps(ARGUMENTS))


class Table:
    multiple, batch = 4, 1

    def __init__(self, network, inputs):
        self.layers = shapes_of(network, inputs)

    def ms(self, path, c_in, c_out):
        return 0.01 + 1e-4 * c_in * c_out

    def network_ms(self, widths):
        return 0.05 + sum(self.ms(path, *counts) for path, counts in widths.items())


@pytest.fixture(autouse=True)
def table(monkeypatch):
    asked = []

    def table_for(file, network, inputs, target, *, batch, cuts, poll, say):
        asked.append((file, target.name, batch, tuple(inputs[0].shape)))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"digest": "feed"}))
        say("measured")
        return Table(network, inputs)

    monkeypatch.setattr(budget_table, "table_for", table_for)
    return asked


@pytest.fixture
def slow(monkeypatch):
    """Measured is a tenth more than asked at first, then right."""
    shares = iter([0.66, 0.6, 0.6])

    class Beside:
        def __init__(self, *given):
            self.records = []

        def __call__(self, ticket):
            share = next(shares)
            return Timed(share, 1.0, share, share - 0.01, share + 0.01)

    monkeypatch.setattr(budget_ticket, "BesideDense", Beside)


def run(capsys, *words):
    code = main(["ticket", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def network(seed=0):
    torch.manual_seed(seed)
    return zoo.build("resnet_digits", **ARGUMENTS)


def test_a_zoo_network_becomes_a_ticket_that_can_be_cut(capsys, table, tmp_path):
    out = tmp_path / "half"
    code, text, errors = run(capsys, *WORDS, *NETWORK, "--no-check", "--out", out)
    assert code == 0, errors
    assert re.search(r"\nasked 0\.6x, predicted 0\.5\d+x \(.* ms\), not timed\nwritten to ", text)
    assert text.endswith(f"next step: deploy-sparse compact {out} --out {out}-compact\n")
    assert "measured" in errors
    assert table == [(tmp_path / "half.table.json", "cpu", None, (2, 1, 8, 8))]
    ticket = Ticket.load(out)
    assert ticket.model == ModelRef("resnet_digits", ARGUMENTS, (1, 8, 8))
    told = ticket.provenance.config
    assert (told["latency"], told["target"], told["batch"], told["table"]) == ("0.6x", "cpu", 1, "feed")
    assert told["weights"] == "random, seed 0"
    made = compact(ticket, network)
    assert made.plan.cost_after.macs < 0.8 * made.plan.cost_before.macs
    shapes = shapes_of(network(), torch.zeros(2, 1, 8, 8))
    for path, shape in shapes_of(made.module, torch.zeros(2, 1, 8, 8)).items():
        counts = [f"{shapes[path].c_in} → {shape.c_in}", f"{shapes[path].c_out} → {shape.c_out}"]
        changed = (shape.c_in, shape.c_out) != (shapes[path].c_in, shapes[path].c_out)
        assert bool(re.search(rf"^{path} +{counts[0]} +{counts[1]}$", text, re.MULTILINE)) == changed
    assert all(torch.equal(ticket.weights[name], weight) for name, weight in network().state_dict().items())


def test_it_is_timed_corrected_and_told_as_json(capsys, slow, tmp_path):
    code, text, errors = run(capsys, *WORDS, *NETWORK, "--out", tmp_path / "out", "--json")
    assert (code, errors) == (0, "")
    found = json.loads(text)
    assert (found["asked"], found["measured"], found["landed"], found["miss"]) == ("0.6x", 0.6, True, 0.0)
    assert len(found["passes"]) == 2
    assert found["passes"][1]["limit_ms"] < found["passes"][0]["limit_ms"]
    assert found["timings"] == [0.6, 0.6]  # the ticket that is delivered was timed twice
    small = compact(Ticket.load(tmp_path / "out"), network)
    kept = {p: [s.c_in, s.c_out] for p, s in shapes_of(small.module, torch.zeros(2, 1, 8, 8)).items()}
    assert {path: counts["kept"] for path, counts in found["widths"].items()} == kept
    assert found["widths"]["conv1"]["dense"] == [1, 16]
    assert found["ticket"] == Ticket.load(tmp_path / "out").hash
    assert Ticket.load(tmp_path / "out").provenance.config["limit_ms"] == found["limit_ms"]


def test_weights_from_a_file(capsys, tmp_path):
    file = tmp_path / "w.safetensors"
    save_file(network(7).state_dict(), str(file))
    code, _, errors = run(capsys, *WORDS, *NETWORK, "--weights", file, "--no-check", "--out", tmp_path / "out")
    assert code == 0, errors
    ticket = Ticket.load(tmp_path / "out")
    assert torch.equal(ticket.weights["conv1.weight"], network(7).state_dict()["conv1.weight"])
    assert re.fullmatch("[0-9a-f]{64}", ticket.provenance.config["weights"])
    file.write_bytes(b"nothing")
    code, _, errors = run(capsys, *WORDS, *NETWORK, "--weights", file, "--no-check", "--out", tmp_path / "o2")
    assert code == 2
    assert "w.safetensors cannot be read" in errors
    save_file({"conv1.weight": torch.zeros(3)}, str(file))
    code, _, errors = run(capsys, *WORDS, *NETWORK, "--weights", file, "--no-check", "--out", tmp_path / "o2")
    assert code == 2
    assert "does not fit resnet_digits" in errors


def test_a_ticket_is_refilled(capsys, tmp_path):
    made = network()
    name = "stages.1.0.conv1.weight"
    mask = torch.ones_like(made.state_dict()[name], dtype=torch.bool)
    mask[:24] = False
    folder = Ticket(dict(made.state_dict()), {name: mask}, ModelRef("resnet_digits", ARGUMENTS, (1, 8, 8)), Provenance("imp")).save(
        tmp_path / "imp"
    )  # fmt: skip
    code, _, errors = run(capsys, folder, *WORDS, "--no-check", "--out", tmp_path / "out")
    assert code == 0, errors
    ticket = Ticket.load(tmp_path / "out")
    assert (ticket.provenance.method, ticket.provenance.parent) == ("refill", Ticket.load(folder).hash)
    assert not bool(ticket.masks[name][:24].any())


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "neither a ticket nor --network"),
        (("somewhere", *NETWORK), "a ticket and --network"),
        (("--weights", "w.safetensors"), "--weights without --network"),
        ((*NETWORK, "--latency", "fast"), "latency 'fast'"),
        ((*NETWORK, "--latency", "0.01x"), "expected: at least 0."),
        ((*NETWORK, "--target", "nowhere"), "nowhere"),
        ((*NETWORK, "--scores", "saliency"), "scores that need data are for Python"),
        ((*NETWORK, "--worth", "gold"), "worth 'gold'"),
        (("--network", "resnet_digit"), "did you mean 'resnet_digits'?"),
        (("--network", "resnet_digits", "--arguments", "{"), "--arguments {"),
        (("--network", "resnet_digits", "--arguments", '{"depth": 3}'), "cannot be built with {'depth': 3}"),
        (("--network", "resnet_digits", "--arguments", "[1]"), "a JSON object of what the factory"),
        ((*NETWORK, "--exclude", "nothing*"), "exclude pattern 'nothing*'"),
    ],
)
def test_what_is_refused(capsys, tmp_path, words, text):
    given = ("--target", "cpu", "--latency", "0.6x", "--no-check", "--out", tmp_path / "out", *words)
    code, _, errors = run(capsys, *given)
    assert code == 2
    assert text in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--worth", "shares"), "did you mean 'share'"),
        (("--multiple", "0"), "--multiple 0"),
        (("--passes", "0"), "--passes 0"),
        (("--seconds", "nan"), "--seconds nan"),
        (("--seconds", "0"), "--seconds 0.0"),
    ],
)
def test_what_cannot_work_is_refused_before_the_table_is_measured(capsys, table, tmp_path, words, text):
    code, _, errors = run(capsys, *WORDS, *NETWORK, *words, "--out", tmp_path / "out")
    assert code == 2
    assert text in errors
    assert table == []


def test_an_occupied_folder_is_refused_before_the_table_is_measured(capsys, table, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    code, _, errors = run(capsys, *WORDS, *NETWORK, "--no-check", "--out", tmp_path / "out")
    assert code == 2
    assert "out already exists" in errors
    assert table == []
    assert (tmp_path / "out" / "notes").read_text() == "mine"


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit):
        main(["ticket", "--help"])
    assert "deploy-sparse ticket --latency 0.5x --target cpu" in capsys.readouterr().out
