"""What the tables of the surgery scoreboard say, and the peer beside it."""

import pytest
import torch
from torch import nn


def done(model, part):
    return {"kind": "part", "model": model, "part": part, "outcome": "ok"}


def surgery_row(model, kind, *, cpu_s=1.0, macs=(100, 30), error=1e-15, **more):
    own = {"float64": error, "float32": 1e-7, "cpu_s": cpu_s, "macs": list(macs), "parameters": [10, 4]}
    stays = [{"kind": "pinned", "reason": r, "groups": 1, "channels": c} for r, c in (("network output", 9), ("x", 3))]
    row = {**done(model, kind), "family": "F", "image": 64, "groups": {"stays": stays}, "peak_gib": 1.0, **own}
    return {**row, **more}


def attempt(cpu_s, macs=(100, 28), silent=True):
    equal = {"silent": silent, "live": False}
    return {
        "outcome": "ok",
        "cpu_s": cpu_s,
        "macs": list(macs),
        "equal": equal,
        "float64": {"silent": 0.0, "live": 0.9},
    }


def peer_row(model, **attempts):
    return {**done(model, "peer"), "family": "F", "image": 64, **attempts}


def goal(table, rows, start):
    found = [row for row in table.goals(table.Board(rows)).rows if row[0].startswith(start)]
    assert len(found) == 1
    return found[0][1:]


def test_goals_are_met_by_numbers_only(table):
    models = [f"torchvision/m{i:02}" for i in range(80)]
    rows = [surgery_row(model, "silent") for model in models] + [
        peer_row(model, generic=attempt(2.0)) for model in models
    ]
    assert goal(table, rows, "all 80 of torchvision exact, silent") == ("80 of 80", "yes")
    assert goal(table, rows, "all 80 of torchvision exact, live") == ("not measured", None)
    assert goal(table, rows, "relative error") == ("1.0e-15", "yes")
    assert goal(table, rows, "median CPU seconds below Torch-Pruning's, silent")[1] == "yes"
    assert goal(table, rows, "CPU seconds for torchvision's 80: at most 90, silent") == ("80.0 for 80", "yes")
    assert goal(table, rows, "CPU seconds for torchvision's 80: at most 90, live") == ("not measured", None)
    assert goal(table, rows, "no network above 10") == ("1.0 (m79)", "yes")
    found, met = goal(table, rows, "MACs kept no more than Torch-Pruning's (within 0.5%), silent")
    assert met == "no"
    assert found.startswith("0 of 80 networks; most above: m79, by 2.0%")
    assert goal(table, rows[1:], "all 80 of torchvision exact, silent") == ("79 of 79", "no")
    worse = [*rows, surgery_row(models[5], "silent", error=2e-10, cpu_s=12.0, macs=(100, 20))]  # measured again
    assert goal(table, worse, "all 80 of torchvision exact, silent") == ("79 of 80", "no")
    assert goal(table, worse, "relative error") == ("2.0e-10", "no")
    assert goal(table, worse, "CPU seconds for torchvision's 80: at most 90, silent") == ("91.0 for 80", "no")
    assert goal(table, worse, "no network above 10") == ("12.0 (m05)", "no")


def test_a_refused_network_is_no_success_and_is_named(table):
    failed = {**surgery_row("timm/a", "live"), "outcome": "failed", "stage": "proof", "reason": "differs by 0.1"}
    rows = [surgery_row("timm/a", "silent"), failed, surgery_row("timm/b", "silent"), surgery_row("timm/b", "live")]
    assert goal(table, rows, "38 of 40 of timm exact, live") == ("1 of 2", "no")
    assert table.failures(table.Board(rows)).rows == (("timm/a", "live", "proof", "differs by 0.1"),)
    assert table.reasons(table.Board(rows)).rows == (("silent", "pinned", "x", 2, 6), ("live", "pinned", "x", 2, 6))
    assert "differs by 0.1" in table.text(rows)


def test_torch_prunings_better_attempt_counts(table):
    no = {"outcome": "failed", "error": "TypeError", "reason": "int + None"}
    rows = [
        peer_row("torchvision/a", generic=attempt(5.0), own_help=attempt(3.0, silent=False)),
        peer_row("torchvision/b", generic=attempt(4.0), own_help=no),
        {**peer_row("torchvision/c", generic=no), "outcome": "failed", "reason": "int + None"},
        {**peer_row("torchvision/d"), "outcome": "failed", "reason": "signal 9"},
    ]
    board = table.Board(rows)
    assert [board.peer(f"torchvision/{name}").get("cpu_s") for name in "abcd"] == [3.0, 4.0, None, None]
    assert table.peer_failures(board).rows == (("c", "int + None"), ("d", "signal 9"))
    (family,) = table.families(board).rows
    assert dict(zip(table.families(board).columns[9:13], family[9:13], strict=True)) == {
        "Torch-Pruning: through": "2 / 4",
        "equal, silent": "1 / 2",
        "equal, live": "0 / 2",
        "CPU s": "3.00 to 4.00",
    }
    networks = table.networks(board)
    helped = [row[networks.columns.index("help")] for row in networks.rows]
    assert helped == ["own", "none", None, None]


def test_exports_count_where_the_dense_network_compiles(table):
    def export(model, kind, **found):
        return {**done(model, f"export-{kind}"), "family": "F", "image": 64, **found}

    both, graph = (
        {"onnx": {"max_rel": 1e-6}, "engine": {"bytes": 2_000_000}},
        {"onnx": {"max_rel": 1e-6}, "engine": None},
    )
    rows = [export("timm/a", kind, **both) for kind in ("dense", "silent", "live")]
    rows += [export("timm/b", "dense", **graph), export("timm/b", "silent", **graph)]
    rows += [{**export("timm/b", "live"), "outcome": "failed", "stage": "onnx", "reason": "no"}]
    assert goal(table, rows, "ONNX export that agrees in ONNX Runtime, silent") == ("2 of 2", "yes")
    assert goal(table, rows, "ONNX export that agrees in ONNX Runtime, live") == ("1 of 2", "no")
    assert goal(table, rows, "compiles with TensorRT-RTX where the dense network does, live") == ("1 of 1", "yes")
    assert [row[-3:] for row in table.networks(table.Board(rows)).rows] == [("2.0 MB",) * 3, ("no",) * 3]


def small_network():
    torch.manual_seed(3)
    first = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 8, 3, groups=8, bias=False)]
    model = nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10))
    return model.eval()


def test_masks_of_the_peer_are_rows_and_if_silent_all_that_belongs_to_them(peer):
    live, silent = small_network(), small_network()
    removed = {("0", -1): torch.tensor([1, 4]), ("1", -1): torch.tensor([1, 4]), ("3", -1): torch.tensor([1, 4])}
    peer.mask_(live, removed, silent=False)
    peer.mask_(silent, removed, silent=True)
    plain = small_network()
    for masked in (live, silent):
        for layer in (0, 3):
            gone = masked[layer].weight.flatten(1).abs().sum(1) == 0
            assert gone.nonzero().flatten().tolist() == [1, 4]
    assert torch.equal(live[0].bias, plain[0].bias)
    assert torch.equal(live[1].weight, plain[1].weight)
    assert (silent[0].bias == 0).nonzero().flatten().tolist() == [1, 4]
    assert (silent[1].weight == 0).nonzero().flatten().tolist() == [1, 4]


def test_the_peers_result_is_compared_with_the_channels_it_removed(peer, subject):
    pytest.importorskip("torch_pruning")
    model, dense = small_network(), small_network()
    inputs = (torch.randn(2, 3, 8, 8),)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for network, generator in zip((model, dense), generators, strict=True):
        subject.enliven_(network, inputs, generator)
    pruned = peer.prune(model, inputs, None, classes=10)
    assert [pruned.model[i].weight.shape[0] for i in (0, 1, 3, 6, 8)] == [4, 4, 4, 6, 10]
    kept = torch.tensor([i for i in range(8) if i not in pruned.removed["0", -1].tolist()])
    assert torch.equal(pruned.model[0].weight, dense[0].weight[kept])
    assert ("8", -1) not in pruned.removed
    assert min(pruned.graph_s, pruned.prune_s) > 0
    found = peer.deviations(dense, pruned, inputs)
    assert found["silent"] < 1e-14
    assert found["live"] > 1e-3


def test_the_classifier_is_a_linear_layer_or_a_convolution(peer):
    model = nn.Sequential(nn.Conv2d(3, 10, 1), nn.Linear(10, 4), nn.Conv2d(10, 4, 1))
    assert peer.classifiers(model, 4) == [model[1], model[2]]


def test_first_runs_are_told_beside_the_median(table):
    """A machine may serve the first run slowly: both are shown, and the note says how many runs were made."""
    first = peer_row("torchvision/a", generic={**attempt(0.5), "cpu_runs": [2.5, 0.5, 0.4]})
    rows = [
        {"kind": "conditions", "runs": 3},
        surgery_row("torchvision/a", "silent", cpu_s=1.0, cpu_runs=[2.0, 1.0, 0.9]),
        first,
    ]
    median, fresh = (
        row[1:] for row in table.goals(table.Board(rows)).rows if row[0].startswith("median") and "silent" in row[0]
    )
    assert median == ("1.00 against 0.50, on the 1 networks that both get through (1 against 0 s in all)", "no")
    assert fresh == ("2.00 against 2.50, on the 1 networks that both get through (2 against 2 s in all)", "yes")
    assert "median of 3 runs" in table.families(table.Board(rows)).note
    assert "median of" not in table.families(table.Board(rows[1:])).note
