"""The page on running engines: its Python runs where it needs no GPU, and what it says of types and limits is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deploy_sparse.engine.runner import Runner
from deploy_sparse.engine.trt.worker import _GRAPHS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "runtime.md"
TEXT = PAGE.read_text()
BLOCKS = re.findall(r"(?:<!-- needs: (\w+) -->\n)?```python\n(.*?)```", TEXT, flags=re.S)


def test_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    ran = 0
    for needs, code in BLOCKS:
        compiled = compile(code, str(PAGE), "exec")
        if not needs:
            exec(compiled, names)
            ran += 1
    assert ran == 2
    assert capsys.readouterr().out == "(4, 10)\nTrue\n"


def test_every_method_in_the_table_is_one_of_a_runner() -> None:
    methods = re.findall(r"^\| `(\w+)\(([^)]*)\)` \|", TEXT, re.M)
    assert [name for name, _ in methods] == ["run", "run_on_gpu", "prepare"]
    for name, arguments in methods:
        names = [word.partition("=")[0] for word in arguments.split(", ")]
        function = getattr(Runner, name)
        assert list(function.__code__.co_varnames[1 : function.__code__.co_argcount]) == names


def test_numbers() -> None:
    assert "keeps the eight sets of shapes used last" in TEXT
    assert _GRAPHS == 8
