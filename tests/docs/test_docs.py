"""What the documentation says is true: its commands run, its links resolve, its numbers are the committed records'."""

import argparse
import importlib.util
import json
import re
import shlex
import shutil
import sys
from importlib import import_module
from pathlib import Path
from statistics import mean
from typing import get_args

import pytest
from recipe_runs import SETTINGS

from deploy_sparse.cli.main import VERBS, main
from deploy_sparse.measure.profile import profile
from deploy_sparse.surgery.compact import Format
from deploy_sparse.surgery.packing import Form
from deploy_sparse.surgery.parts import Kind
from deploy_sparse.train.run import read_run
from deploy_sparse.tune.formats import choose_format
from deploy_sparse.tune.run_report import load_report, write_report_files

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    p
    for p in ROOT.rglob("*.md")
    if not {"runs", "node_modules"} & set(p.relative_to(ROOT).parts)
    and not any(part.startswith(".") for part in p.relative_to(ROOT).parts)
)
RECORDS = sorted(p.parent for p in (ROOT / "benchmarks/records").rglob("report.json"))


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.fixture
def workplace(small_run, tmp_path, monkeypatch):
    """A folder in which the README's small run is finished already."""
    shutil.copytree(small_run[0], tmp_path / "runs" / "imp_refill-resnet_digits")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def short_times(monkeypatch):
    """Timing that is asked for without its duration is done in a moment."""
    for function in (profile, choose_format):
        monkeypatch.setitem(function.__kwdefaults__, "duration_s", 0.05)
    monkeypatch.setitem(profile.__kwdefaults__, "warmup_ms", 10.0)


@pytest.fixture
def finished(small_run, small_regroup_run, small_chase_run):
    """The folders of small runs by recipe."""
    return {"imp_refill": small_run[0], "imp_regroup": small_regroup_run[0], "chase": small_chase_run[0]}


def test_every_command_of_the_readme_runs(workplace, finished, short_times, capsys):
    lines = [line.partition("#")[0].strip() for block in blocks("README.md", "sh") for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("deploy-sparse ")]
    assert {words[1] for words in commands} == {
        "doctor",
        "ls",
        "run",
        "cat",
        "cp",
        "show",
        "inspect",
        "compact",
        "build",
        "engines",
        "profile",
        "report",
    }
    for words in commands:
        if words[1] == "run" and "--resume" not in words:  # finished already, small: the whole one is `make demo`
            run = read_run(finished[words[2]])
            assert run["status"] == "finished"
            assert shlex.split(run["origin"])[: len(words)] == words
            continue
        if words[1] == "run":
            words += SETTINGS[words[2]]
        if words[1] == "profile":
            words += ["--seconds", "0.05"]
        assert main(words[1:]) == 0, (words, capsys.readouterr().err)


def test_every_example_of_the_help_is_a_command_that_parses():
    """Each verb's examples name its own options; what they need (runs, engines) is made by other tests."""
    for verb in VERBS:
        lines = import_module(f"deploy_sparse.cli.{verb}").EXAMPLES.splitlines()
        for line in [line for line in lines if line.startswith("  ")]:
            words = shlex.split(line)
            if words[0] == "torchrun":
                words = ["deploy-sparse", *words[words.index("deploy_sparse.cli.main") + 1 :]]
            assert words[:2] == ["deploy-sparse", verb]
            parser = argparse.ArgumentParser(allow_abbrev=False)
            import_module(f"deploy_sparse.cli.{verb}").configure(parser)
            parser.add_argument("--json", action="store_true")
            if getattr(import_module(f"deploy_sparse.cli.{verb}"), "TAKES_OVERRIDES", False):
                parser.parse_known_args(words[2:])
            else:
                parser.parse_intermixed_args(words[2:])


def test_every_python_block_of_the_readme_runs(workplace, short_times, capsys):
    namespace: dict = {}
    for block in blocks("README.md", "python"):
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert namespace["output"].shape == (4, 10)
    assert "Conv2d(3, 8, kernel_size=(3, 3)" in printed
    assert "max|Δ|" in printed


def test_every_python_block_of_the_page_on_surgery_runs(capsys):
    namespace: dict = {}
    for block in blocks("docs/surgery.md", "python"):
        exec(compile(block, "docs/surgery.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "(carrier)" in printed
    assert "max|Δ|" in printed


def test_every_python_block_of_the_page_on_packing_runs(capsys):
    namespace: dict = {}
    for block in blocks("docs/packing.md", "python"):
        exec(compile(block, "docs/packing.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "PackedConv2d(64, 64" in printed
    assert re.search(r"\d layers? of blocks: ", printed)
    assert "max|Δ|" in printed


def test_the_page_on_packing_explains_every_form_and_format():
    text = (ROOT / "docs/packing.md").read_text()
    forms, formats = (
        text.split(title)[1].split("\n## ")[0] for title in ("## Forms of a layer", "## Formats of a network")
    )
    assert set(re.findall(r"^\| `(\w+)`", forms, re.MULTILINE)) == set(get_args(Form))
    assert set(re.findall(r"^\| `(\w+)`", formats, re.MULTILINE)) - {"format"} == {"auto", *get_args(Format)}


def test_the_page_on_surgery_explains_every_reason_why_channels_stay():
    section = (ROOT / "docs/surgery.md").read_text().split("## Why channels stay")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(get_args(Kind))


def test_the_first_commands_are_the_two_make_targets():
    assert [line.split("#")[0].strip() for line in blocks("README.md", "sh")[0].splitlines()] == [
        "make demo",
        "make test",
    ]
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"^make (\w+)", "\n".join(blocks(page, "sh")), re.MULTILINE):
            assert f"\n{target}:" in makefile, f"{page}: make {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_relative_link_resolves(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def script(name):
    specification = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


def test_the_pages_numbers_are_the_records():
    keep = script("keep")
    readme, *pages = (page.read_text() for page in keep.PAGES)
    assert keep.RECORD.findall(readme)
    assert {page.name for page in keep.PAGES} >= {"README.md", "reproduction.md", "chase.md"}
    unmeasured = {page.name for page in keep.PAGES[1:] if not keep.RESULTS.findall(page.read_text())}
    figureless = {"benchmarks", "budgets", "bundles", "layers", "reports", "runtime"}
    assert unmeasured == {f"{page}.md" for page in figureless}
    for text in (readme, *pages):
        assert keep.with_tables(text) == text


RESULTS = sorted((ROOT / "benchmarks/records").rglob("results.jsonl"))
SCRIPTS = {"densities": "densities", "tickets-resnet_synthetic": "tickets", "mask-cost": "mask_cost", "regroup-quality": "regroup_quality", "chase-quality-resnet_synthetic": "chase_quality", "chase-quality-30-epochs": "chase_quality", "dst-cost": "dst_cost", "surgery": "surgery", "packed": "packed", "shortcuts": "shortcuts", "block-kernel": "block_kernel", "engines": "engines", "budgets-resnet_synthetic": "budgets", "selfcheck": "selfcheck", "latency-tables": "latency_tables"}  # fmt: skip


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: str(p.parent.relative_to(ROOT)))
def test_committed_tables_are_rendered_from_their_records(path):
    module = script(SCRIPTS[path.parent.name])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0]["environment"]["torch"]
    assert module.text(rows) == path.with_suffix(".md").read_text()


@pytest.mark.parametrize("folder", RECORDS, ids=lambda p: str(p.relative_to(ROOT)))
def test_committed_reports_render_byte_for_byte(folder, tmp_path):
    write_report_files(tmp_path, load_report(folder))
    for name in ("report.md", "report.html"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_the_unstructured_tickets_lead_is_what_the_record_says():
    """The page's verdict: the ticket beats both controls, for every seed and round."""
    path = ROOT / "benchmarks/records/cpu-2-cores/tickets-resnet_synthetic/results.jsonl"
    _, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = {(r["round"], r["seed"], r["arm"]): r for r in rows if r["structure"] == "unstructured"}
    assert {(number, seed) for number, seed, _ in found} == {(n, s) for n in (3, 6, 12) for s in (0, 1, 2)}
    for (number, seed, arm), row in found.items():
        ticket = found[number, seed, "ticket"]
        assert row["density"] == ticket["density"]
        assert arm == "ticket" or ticket["test_accuracy"] > row["test_accuracy"]


def test_chases_verdict_is_what_the_record_says():
    """The page's leads and losses at each density, in points of test accuracy."""
    path = ROOT / "benchmarks/records/cpu-2-cores/chase-quality-resnet_synthetic/results.jsonl"
    _, *rows = [json.loads(line) for line in path.read_text().splitlines()]

    def points(arm, against=""):
        own = [row["test_accuracy"] for row in rows if (row["arm"], row["against"]) == (arm, against)]
        assert len(own) == 3
        return [100 * accuracy for accuracy in own]

    def lead(arm, against):
        return [a - b for a, b in zip(points("Chase", against), points(arm, against), strict=True)]

    dense = mean(points("dense"))
    after = {
        (c, d): mean(points("Chase", f"{c}, density {d}")) - dense
        for c in ("internal", "prune_skip")
        for d in (0.1, 0.2)
    }
    assert [round(after[key], 1) for key in after] == [-2.4, 0.2, -2.6, -0.2]
    assert round(mean(points("dynamic sparse training", "density 0.1")) - dense, 1) == -1.9
    assert min(lead("narrower", "prune_skip, density 0.2")) > 0 > min(lead("narrower", "internal, density 0.2"))
    means = [
        mean(lead(arm, f"{c}, density 0.2")) for arm in ("narrower", "one-shot") for c in ("internal", "prune_skip")
    ]
    assert [f"{value:+.2f}" for value in means] == ["+0.10", "+0.35", "+0.22", "-0.38"]
    for coupling in ("internal", "prune_skip"):
        assert max(mean(lead(arm, f"{coupling}, density 0.1")) for arm in ("narrower", "one-shot")) < -2
        for share in (0.1, 0.2, 0.4):
            against = f"{coupling}, density {share}"
            assert mean(points("one-shot, twice the epochs", against)) > max(dense, mean(points("Chase", against)))
            macs = {row["arm"]: row["macs"] for row in rows if row["against"] == against}
            assert macs["Chase"] <= min(macs.values())
    sparser = [100 * r["sparser"] for r in rows if r["against"] == "density 0.1" and "sparser" in r]
    assert (round(min(sparser)), round(max(sparser))) == (57, 62)
    assert [
        round(100 * mean(r["amenable"] for r in rows if r["against"] == f"density {d}")) for d in (0.1, 0.2, 0.4)
    ] == [10, 1, 0]


def test_chases_verdict_after_longer_training_is_what_the_record_says():
    path = ROOT / "benchmarks/records/cpu-2-cores/chase-quality-30-epochs/results.jsonl"
    conditions, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert conditions["config"]["fit"]["epochs"] == 30
    leads = []
    for coupling in ("internal", "prune_skip"):
        own = [row for row in rows if row["against"] == f"{coupling}, density 0.1"]
        found = {
            arm: 100 * mean(row["test_accuracy"] for row in own if row["arm"] == arm)
            for arm in ("Chase", "narrower", "one-shot")
        }
        leads += [found["Chase"] - found["narrower"], found["Chase"] - found["one-shot"]]
    assert (round(max(leads), 2), round(min(leads), 2)) == (-0.25, -0.55)


def test_there_are_records():
    assert RECORDS


def test_the_repository_speaks_of_the_project_alone():
    """No path of a developer's machine."""
    banned = re.compile(r"/(home|root|tmp|work|Users)/\w")
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if path.suffix in {".py", ".md", ".toml", ".json", ".jsonl", ".html"} and not any(
            p.startswith(".") or p in {"runs", "out", "dist", "build"} for p in parts
        ):
            found = banned.search(path.read_text())
            assert path == Path(__file__) or found is None, f"{path}: {found}"
