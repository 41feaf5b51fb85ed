"""``deploy-sparse table``: what is written, printed and refused."""

import json

import pytest

from deploy_sparse.cli.main import main
from deploy_sparse.tune.latency.table import read_table
from deploy_sparse.tune.run_report import load_report, write_report_files


def run(capsys, *words):
    code = main(["table", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


FAST = ("--network", "resnet_synthetic", "--input-size", "8", "--network-seconds", "0.05", "--seconds", "1")


def test_a_table_is_written_with_its_report(capsys, tmp_path):
    out = tmp_path / "table"
    code, text, said = run(capsys, *FAST, "--cuts", "0.5", "--out", str(out), "--json")
    assert code == 0, said
    found = json.loads(text)
    table = read_table(found["table"])
    assert (found["multiple"], found["dense_ms"]) == (table.multiple, table.dense_ms)
    assert found["width_multiple_of_target"] == 4
    assert [cut["name"] for cut in found["cuts"]] == ["50 % of channels cut"]
    assert "shapes" in said
    write_report_files(tmp_path / "again", load_report(out))
    for name in ("report.md", "report.html"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    page = (out / "report.md").read_text()
    assert "Whole networks against the table" in page
    assert "Layers over their input channels" in page
    assert "deploy-sparse table --target cpu --network resnet_synthetic --batch 1 --input-size 8 --cuts 0.5" in page


def test_the_result_is_shown_as_text(capsys, tmp_path):
    code, text, _ = run(capsys, *FAST, "--cuts", "--out", str(tmp_path))
    assert code == 0
    assert "Dense, at batch 1:" in text
    assert f"written to {tmp_path / 'table.json'}" in text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--network", "resnet51"), "unknown network 'resnet51'"),
        (("--network", "model.onnx"), "model.onnx is an ONNX file"),
        (("--target", "gpu"), "unknown target 'gpu'"),
        (("--input-size", "0"), "an input size of 0"),
        (("--network", "resnet_digits", "--batch", "1000"), "batch 1000 for target 'cpu'"),
    ],
)
def test_bad_words_are_refused(capsys, tmp_path, words, text):
    code, _, problem = run(capsys, "--network", "resnet_digits", *words, "--out", str(tmp_path))
    assert code == 2
    assert text in problem
    assert not list(tmp_path.iterdir())


def test_a_runs_folder_is_not_written_to(capsys, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    code, _, problem = run(capsys, "--network", "resnet_digits", "--out", str(tmp_path))
    assert code == 2
    assert "holds a run with a report of its own" in problem
