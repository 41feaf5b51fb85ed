"""The page for deployment pipelines: its Python runs, its table shows the shipped targets."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import get_args

import pytest

from deploy_sparse.cli.main import main
from deploy_sparse.config import keys_of
from deploy_sparse.engine.store import State
from deploy_sparse.engine.target import RUNTIMES_OF, Runtime, Target, list_targets, load_target, targets_folder

PAGE = targets_folder().parent / "README.md"
BLOCKS = re.findall(r"(?:<!-- needs: (\w+) -->\n)?```python\n(.*?)```", PAGE.read_text(), flags=re.S)


def test_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    ran = 0
    for needs, code in BLOCKS:
        if needs and importlib.util.find_spec(needs) is None:
            continue
        for folder in Path("engines/out").glob("demo-cpu-*"):
            code = code.replace("engines/out/demo-cpu-<key>", str(folder))
        exec(compile(code, str(PAGE), "exec"), names)
        ran += 1
    assert ran >= 2
    assert "(4, 10)" in capsys.readouterr().out


def test_table_of_targets() -> None:
    rows = re.findall(
        r"^\| `([a-z0-9-]+)` \| ([a-z-]+) \| .* \| (\d+ / \d+ / \d+) \| (\d+) \|$", PAGE.read_text(), re.M
    )
    shown = {name: (runtime, batch, int(multiple)) for name, runtime, batch, multiple in rows}
    expected = {}
    for name in list_targets():
        target = load_target(name)
        batch = f"{target.batch.min} / {target.batch.opt} / {target.batch.max}"
        expected[name] = (target.runtime, batch, target.width_multiple)
    assert shown == expected


def test_table_of_keys_is_complete_and_right() -> None:
    rows = re.findall(r"^\| `([A-Za-z0-9_.]+)` \| (.+?) \| ([a-z, -]+) \| .+ \|$", section("### Keys"), re.M)
    shown = {key: (default.strip("`"), runtimes) for key, default, runtimes in rows}
    assert len(shown) == len(rows)
    everyone = frozenset(get_args(Runtime))
    expected = {"inherits": ("none", "all")}
    for key, (_, default, _) in keys_of(Target).items():
        runtimes = RUNTIMES_OF.get(key.partition(".")[0], everyone)
        key = key.replace("axes.", "axes.NAME.")
        text = "none" if default is None else json.dumps(default)
        expected[key] = (text, "all" if runtimes == everyone else ", ".join(sorted(runtimes)))
    expected["name"] = ("the file's", "all")
    assert shown == expected


def test_example_of_a_target_loads(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(inherits.*?)```", PAGE.read_text(), flags=re.S)
    (tmp_path / "mine.toml").write_text(example)
    found = load_target(tmp_path / "mine.toml")
    assert (found.compute_capabilities, found.sparse_weights, found.batch.opt) == (("SM80",), True, 16)
    (example,) = re.findall(r"```toml\n(.*?axes\.height.*?)```", PAGE.read_text(), flags=re.S)
    (tmp_path / "mine.toml").write_text(example.rpartition("```toml\n")[2])
    assert load_target(tmp_path / "mine.toml").axes["width"].max == 512


def test_table_of_states_and_commands_of_the_store(capsys, built, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    text = section("## The store")
    assert re.findall(r"^\| `(\w+)` \|", text, re.M) == [*get_args(State)]
    shutil.copytree(built.folder, tmp_path / "engines" / "out" / built.folder.name)
    monkeypatch.chdir(tmp_path)
    commands = [line.partition("#")[0].split() for line in text.splitlines() if line.startswith("deploy-sparse ")]
    assert {words[2] for words in commands} == {"ls", "verify", "gc"}
    for words in commands:
        assert main(words[1:]) == 0, capsys.readouterr().err


def section(title: str) -> str:
    text = PAGE.read_text().split(f"\n{title}\n")[1]
    return re.split(r"^#{2,3} ", text, flags=re.M)[0]


def test_manifest_table_names_every_key(built) -> None:
    documented = set(re.findall(r"`([a-z0-9_]+)`", PAGE.read_text().split("## The manifest")[1]))
    assert set(built.manifest) - {"name"} <= documented
