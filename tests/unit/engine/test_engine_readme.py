"""The page for deployment pipelines: its Python runs, its table shows the shipped targets."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from deploy_sparse.engine.target import list_targets, load_target, targets_folder

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


def test_manifest_table_names_every_key(built) -> None:
    documented = set(re.findall(r"`([a-z0-9_]+)`", PAGE.read_text().split("## The manifest")[1]))
    assert set(built.manifest) - {"name"} <= documented
