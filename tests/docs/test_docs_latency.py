"""docs/latency.md: its command and its Python run, and its numbers are the code's."""

import re
import shlex
from pathlib import Path

from deploy_sparse.cli.main import main
from deploy_sparse.tune.latency import bench, measure, multiple
from deploy_sparse.tune.latency.sampling import CHECKS, Sampler
from deploy_sparse.tune.latency.shapes import LayerShape
from deploy_sparse.tune.latency.table import read_table

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "latency.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_command_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (words,) = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    small = {"resnet18": "resnet_synthetic"}
    words = [small.get(word, word) for word in words]  # the same command, of a smaller network
    assert main([*words[1:], "--seconds", "1", "--cuts"]) == 0, capsys.readouterr().err
    assert {path.name for path in Path("tables/resnet18").iterdir()} >= {"table.json", "report.md", "report.html"}


def test_the_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(code, "docs/latency.md", "exec"), {})
    assert "channels are computed together" in capsys.readouterr().out
    assert read_table("table.json").batch == 1
    assert list(Path("times").glob("point-*.json"))


def test_the_pages_numbers_are_the_codes():
    sampler = Sampler(LayerShape("linear", 1, 1), 1)
    text = " ".join(PAGE.split())
    for said in (
        f"more than {sampler.tolerance:.0%} off a straight line".replace("%", " %"),
        f"where {'two' if CHECKS == 2 else CHECKS} points by lot are more than {100 * sampler.check:g} % off",
        f"below {100 * measure.FLOOR:g} % of the network",
        f"in {'four' if measure.PASSES == 4 else measure.PASSES} passes",
        f"lower quartile of {bench.ROUNDS} calls",
        f"not more than {100 * (multiple.FREE - 1):.0f} % at any",
        f"({measure.SECONDS / 60:g} minutes by default)",
    ):
        assert said in text, said
    assert (bench.QUARTILE, multiple.NOISE, multiple.STEPS) == (25, 0.05, 4)
    assert (multiple.PAID, multiple.ERRORS, measure.WORTH, multiple.LARGEST) == (0.5, 3.0, 0.1, 128)
