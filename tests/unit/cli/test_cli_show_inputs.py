"""``show`` says how many inputs a layer reads where it does not read all of them."""

import torch

from deploy_sparse.cli.main import main
from deploy_sparse.structure import unused_inputs
from deploy_sparse.ticket import ModelRef, Provenance, Ticket


def test_unused_inputs_are_counted():
    mask = torch.ones(8, 8, 3, 3, dtype=torch.bool)
    mask[:, 2] = False
    mask[:, 5, 0] = False
    assert unused_inputs(mask) == 1
    assert unused_inputs(mask[:, :, 0, 0]) == 2


def test_inputs_are_named_where_some_are_unused(capsys, tmp_path):
    columns, rows, both = (torch.ones(8, 8, 3, 3, dtype=torch.bool) for _ in range(3))
    columns[:, 2] = False
    rows[[0, 7]] = False
    both[0] = both[:, 3:5] = False
    masks = {"columns": columns, "rows": rows, "both": both}
    weights = {name: torch.ones(8, 8, 3, 3) for name in masks}
    Ticket(weights, masks, ModelRef("net"), Provenance("test")).save(tmp_path / "t")
    assert main(["show", str(tmp_path / "t")]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert " 8 of 8 rows, 7 of 8 inputs " in lines["columns"]
    assert " 6 of 8  " in lines["rows"]
    assert " 7 of 8 rows, 6 of 8 inputs " in lines["both"]


def test_of_single_weights_the_channels_that_are_left_are_named_too(capsys, tmp_path):
    mask = torch.rand(8, 8, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[:3] = mask[:, :2] = False
    Ticket({"w": torch.ones(8, 8, 3, 3)}, {"w": mask}, ModelRef("net"), Provenance("test")).save(tmp_path / "t")
    assert main(["show", str(tmp_path / "t")]) == 0
    assert " unstructured  5 of 8 rows, 6 of 8 inputs " in capsys.readouterr().out
