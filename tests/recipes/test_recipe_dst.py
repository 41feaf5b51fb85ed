"""Chase, RigL and SET, small, end to end: what their tickets are, what reports say, and the same ticket after any stop."""

import json
import re
import signal

import pytest
import torch
from recipe_runs import CHASE, DST, finish, stop_when

from deploy_sparse import Ticket, load_compact
from deploy_sparse.cli.main import main
from deploy_sparse.sparsify.coupling import channel_pools, removed_channels
from deploy_sparse.sparsify.exploration import Exploration
from deploy_sparse.sparsify.imp import dense_masks, head_of
from deploy_sparse.structure import density
from deploy_sparse.surgery.graph import channel_groups
from deploy_sparse.surgery.plan import SurgeryPlan
from deploy_sparse.zoo import build

WIDTHS = (16, 16, 32)


def run(capsys, folder, recipe, *more):
    words = [*(CHASE if recipe == "chase" else DST), "--json", *more]
    assert main(["run", recipe, "--config", "resnet_digits", "--out", str(folder), *words]) == 0, (
        capsys.readouterr().err
    )
    return json.loads(capsys.readouterr().out)


def metrics(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["training"] == "sparse"]


@pytest.fixture
def whole(small_chase_run):
    return small_chase_run


@pytest.fixture(scope="module")
def pools():
    network = build("resnet_digits", widths=WIDTHS)
    groups = channel_groups(network, (torch.zeros(2, 1, 8, 8),))
    return channel_pools(dense_masks(network, head=True), groups, "prune_skip", head=head_of(network))


def test_chase_leaves_the_channels_and_the_weights_asked_for(whole, pools):
    folder, result = whole
    ticket = Ticket.load(folder / "ticket")
    assert ticket.hash == result["ticket"]
    gone = sum(int(removed_channels(ticket.masks, pool).sum()) for pool in pools)
    assert gone == round(0.5 * sum(pool.size for pool in pools))
    weights = {name: mask for name, mask in ticket.masks.items() if mask.dim() > 1}
    assert density(weights) == pytest.approx(0.1, abs=1e-3)
    assert ticket.provenance.metrics["best_epoch"] >= 4  # none before all channels are gone, at 80 % of six epochs


def test_chases_compact_network_is_smaller_and_equal(whole):
    folder, _ = whole
    ticket = Ticket.load(folder / "ticket")
    dense = build("resnet_digits", widths=WIDTHS).eval()
    dense.load_state_dict(ticket.masked_weights())
    images = torch.randn(16, 1, 8, 8)
    expected = dense(images)
    assert (load_compact(folder / "compact")(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
    plan = SurgeryPlan.load(folder / "compact")
    assert plan.cost_after.macs < plan.cost_before.macs
    assert plan.partly_filled  # what stays is still sparse, and the plan says so


def test_chases_report_says_how_much_of_the_sparsity_an_engine_can_use(whole):
    folder, _ = whole
    rows, ticket, plan = metrics(folder), Ticket.load(folder / "ticket"), SurgeryPlan.load(folder / "compact")
    kept = rows[int(ticket.provenance.metrics["best_epoch"])]
    report = (folder / "report.md").read_text()
    table = report[report.index("## Sparsity an engine can use") :]
    deployed = plan.cost_after.macs / plan.cost_before.macs
    assert f"| weights that are not zero, of the masked layers | {kept['density']:.1%} |" in table
    assert f"| FLOPs of non-zero weights only (theoretical) | {kept['theoretical_flops']:.1%} |" in table
    assert f"| FLOPs once removed channels are cut (supported by a GPU) | {kept['supported_flops']:.1%} |" in table
    assert f"| FLOPs of the compact network as it is deployed | {deployed:.1%} |" in table
    assert f"| theoretical FLOPs of the training, of a dense one as long | {kept['training_flops']:.1%} |" in table
    assert kept["theoretical_flops"] < kept["supported_flops"] < 1
    for layer in plan.layers:
        assert f"| {layer.name} |" in table
        assert f"| {layer.compact[0]}×{layer.compact[1]} |" in table


def test_chases_report_says_what_the_presets_came_to_and_what_was_kept(whole):
    folder, _ = whole
    report = (folder / "report.md").read_text()
    table = report[report.index("## Schedule") :].split("## ")[1]
    metric = Ticket.load(folder / "ticket").provenance.metrics
    assert "| updates | every 4 steps until step 108; all layers as one pool, growth by gradient |" in table
    assert "| until step 86 | an update drops to the budget and grows 5.0% of all weights above it at first" in table
    late = Exploration(4, 108, fraction=0.5, final_fraction=0.005).fraction_at(86)
    assert f"| from step 86 | an update drops and grows {late:.1%} of the budget at first, 0.5% at last |" in table
    assert re.search(r"channels go \| at \d+ steps from 2 to 86, by umm", table)
    assert f"of epoch {metric['best_epoch'] + 1:.0f}, with {metric['validation_accuracy']:.2%} on validation" in table
    assert "re-estimated" not in table
    assert report.index("## Sparsity an engine can use") < report.index("## Channels sparser than their layer")
    page = (folder / "report.html").read_text()
    assert "less than half as dense (amenable)" in page
    assert "Weights, channels and FLOPs" in page


def test_chases_metrics_follow_its_schedule(whole):
    rows = metrics(whole[0])
    left = [row["channels_left"] for row in rows]
    assert left == sorted(left, reverse=True)
    assert left[0] > left[2] > left[-1] == 0.5
    explored = [row["explored"] for row in rows]
    assert explored == sorted(explored)
    assert explored[-1] > rows[-1]["density"]


@pytest.mark.parametrize(
    ("appears", "delay", "number"),
    [
        ("checkpoints/sparse", 0.2, signal.SIGTERM),
        pytest.param("checkpoints/sparse", 0.0, signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_stopped_among_the_removals_it_ends_with_the_same_ticket(whole, tmp_path, appears, delay, number):
    folder = tmp_path / "stopped"
    answer = stop_when(folder, appears, number, delay, recipe="chase")
    assert answer.returncode == (-9 if number == signal.SIGKILL else 143), answer.stderr
    assert not (folder / "sparse").exists()  # the sparse training was not over
    assert finish(folder, "--resume", recipe="chase")["ticket"] == whole[1]["ticket"]
    assert metrics(folder) == metrics(whole[0])


def test_beside_a_trained_baseline_both_have_an_accuracy(tmp_path, capsys):
    result = run(capsys, tmp_path / "run", "rigl", "--fit.epochs", "2", "--sparse.baseline", "trained")
    accuracies = [row[3] for row in result["timed"]["rows"]]
    assert len(accuracies) == 2
    assert all(text.endswith("%") for text in accuracies)
    assert Ticket.load(tmp_path / "run/dense").hash != Ticket.load(tmp_path / "run/sparse").hash


@pytest.mark.parametrize("recipe", ["rigl", "set"])
def test_without_channel_removal_an_engine_gains_nothing_and_the_report_says_so(tmp_path, capsys, recipe):
    run(capsys, tmp_path / "run", recipe, "--sparse.baseline", "untrained")
    ticket = Ticket.load(tmp_path / "run/ticket")
    assert ticket.provenance.method == recipe
    assert density(ticket.masks) == pytest.approx(0.1, abs=1e-3)
    assert all(mask.dim() > 1 for mask in ticket.masks.values())
    report = (tmp_path / "run/report.md").read_text()
    assert "FLOPs once removed channels are cut (supported by a GPU) | 100.0% |" in report
    rows = metrics(tmp_path / "run")
    assert {row["supported_flops"] for row in rows} == {1.0}
    assert not (tmp_path / "run/rounds").exists()  # the baseline was not trained
    dense = next(line for line in report.splitlines() if line.startswith("| dense | cpu")).split("|")
    header = next(line for line in report.splitlines() if line.startswith("| subject | target")).split("|")
    assert dict(zip(header, dense, strict=True))[" test accuracy "] == " – "  # and has no accuracy


def test_reestimated_norms_change_the_ticket_and_not_its_masks(whole, tmp_path, capsys):
    result = run(capsys, tmp_path / "run", "chase", "--sparse.reestimate", "true")
    before, after = Ticket.load(tmp_path / "run/sparse"), Ticket.load(tmp_path / "run/ticket")
    assert result["ticket"] == after.hash != before.hash == after.provenance.parent
    assert all(torch.equal(mask, after.masks[name]) for name, mask in before.masks.items())
    changed = {name for name, tensor in before.weights.items() if not torch.equal(tensor, after.weights[name])}
    assert changed
    assert all("running_" in name or "num_batches" in name for name in changed)
    assert "| BatchNorm | statistics re-estimated" in (tmp_path / "run/report.md").read_text()


def test_adamw_in_mixed_precision_trains_a_chase_ticket(tmp_path, capsys):
    optimizer = ["--fit.optimizer", "adamw", "--fit.lr", "0.01", "--fit.epochs", "3", "--runtime.precision", "bf16"]
    run(capsys, tmp_path / "run", "chase", *optimizer)
    ticket = Ticket.load(tmp_path / "run/ticket")
    weights = {name: mask for name, mask in ticket.masks.items() if mask.dim() > 1}
    assert density(weights) == pytest.approx(0.1, abs=1e-3)
