"""docs/bundles.md: its commands and its Python run, its table of tolerances is the code's."""

import glob
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from deploy_sparse import build_engine
from deploy_sparse.bundle.sample import tolerance_of
from deploy_sparse.cli.main import main

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "bundles.md").read_text()


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return build_engine(network, "cpu", torch.randn(2, 1, 8, 8), "engines/out", name="demo").folder


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_commands_and_python_run(workplace, capsys):
    pytest.importorskip("tensorrt_rtx", reason="the page builds for rtx-sm89", exc_type=ImportError)
    commands = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) == 5
    for words in commands:
        expanded = [found for word in words for found in (glob.glob(word) if "*" in word else [word])]
        assert main(expanded[1:]) == 0, capsys.readouterr().err
    assert Path("models/demo/config.pbtxt").is_file()
    (code,) = blocks("python")
    exec(compile(code, "docs/bundles.md", "exec"), {"folder": workplace})
    printed = capsys.readouterr().out
    assert "the ONNX graph on this CPU computes the parity sample" in printed
    assert "received/demo-cpu-" in printed
    assert len(list(Path("received").glob("demo-*"))) == 2


def test_table_of_tolerances():
    rows = dict(re.findall(r"^\| ([a-zA-Z0-9, ]+) \| (0\.\d+) \|$", PAGE, re.M))
    assert {name: float(value) for name, value in rows.items()} == {
        "fp32": tolerance_of({"built": "fp32"}),
        "fp32 with TF32, fp16": tolerance_of({"built": "fp32", "tf32": True}),
        "bf16, int8": tolerance_of({"built": "bf16"}),
        "others": tolerance_of({"built": "fp8"}),
    }
    assert tolerance_of({"built": "fp16"}) == tolerance_of({"built": "fp32", "tf32": True})
    assert tolerance_of({"built": "int8"}) == tolerance_of({"built": "bf16"})
