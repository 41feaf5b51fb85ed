"""``show`` says of a regrouped ticket how many rows are in how many blocks."""

import torch

from deploy_sparse.cli.main import main
from deploy_sparse.ticket import ModelRef, Provenance, Ticket


def test_blocks_are_counted(capsys, tmp_path):
    mask = torch.zeros(20, 3, 3, 3, dtype=torch.bool)
    mask[:8, :2] = mask[8:18, 1, 1] = True
    taps = torch.zeros(4, 3, 3, 3, dtype=torch.bool)
    taps[:, :, 0] = True
    weights = {"a.weight": torch.ones(20, 3, 3, 3), "b.weight": torch.ones(4, 3, 3, 3)}
    Ticket(weights, {"a.weight": mask, "b.weight": taps}, ModelRef("net"), Provenance("test")).save(tmp_path / "t")
    assert main(["show", str(tmp_path / "t")]) == 0
    out = capsys.readouterr().out
    assert "18 of 20 in 2 blocks" in out
    assert "4 of 4 in 1 block " in out
