"""Two real engines of one network, layer by layer: unaligned widths are named, and no time is lost."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from deploy_sparse import zoo
from deploy_sparse.cli.main import main
from deploy_sparse.engine.build import build_engine
from deploy_sparse.engine.entry import Engine, open_entry
from deploy_sparse.engine.target import Batch, load_target
from deploy_sparse.errors import ConfigError, EngineError
from deploy_sparse.tune.layers import LayerReport, profile_layers

X86 = platform.machine() in ("x86_64", "AMD64")
needs_x86 = pytest.mark.skipif(not X86, reason="NCHWc kernels differ by processor")


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 64, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    ).eval()


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> dict[int, Engine]:
    folder, images = tmp_path_factory.mktemp("layers"), torch.randn(2, 3, 24, 24)
    return {
        width: build_engine(network(width), "cpu", images, folder, name=f"width-{width}") for width in (128, 64, 61)
    }


@pytest.fixture(scope="module")
def odd(engines) -> LayerReport:
    return profile_layers(engines[128], engines[61], seconds=0.05, rounds=3)


def of(report: LayerReport, layer: str):
    return next(pair for pair in report.pairs if pair.name == layer)


def test_no_time_is_lost_and_the_sum_stands_beside_a_whole_run(odd: LayerReport) -> None:
    for side, whole in (("dense", odd.dense), ("sparse", odd.sparse)):
        rows = [row for pair in odd.pairs if (row := getattr(pair, side)) is not None]
        assert sum(row.ms for row in rows) == pytest.approx(whole.total_ms)
        assert whole.plain_ms > 0.5 * whole.total_ms
        assert whole.runs >= 60
    note = odd.table().note
    assert "dense: layers add up to" in note
    assert "a whole run takes" in note
    assert "GMAC/s" in note
    assert "GB/s" in note


def test_what_no_layer_took_is_told(odd: LayerReport) -> None:
    idle = replace(odd.dense, plain_ms=2 * odd.dense.total_ms)
    assert " ms of it are in no layer" in replace(odd, dense=idle).notes()[0]
    whole = replace(odd.dense, plain_ms=odd.dense.total_ms)
    assert replace(odd, dense=whole).notes()[0].endswith(" with it")


def test_layers_are_matched_by_the_paths_of_their_modules(odd: LayerReport) -> None:
    two_sided = {pair.name for pair in odd.pairs if pair.dense and pair.sparse}
    assert {"0", "2", "4", "6", "9"} <= two_sided
    cut = of(odd, "4")
    assert cut.predicted == pytest.approx((128 / 61) ** 2)
    assert cut.dense.work.macs == 128 * 128 * 9 * 24 * 24
    assert cut.sparse.work.shapes == ("61→61 3×3",)
    assert of(odd, "2").predicted == pytest.approx(128 / 61)
    assert [reason.kind for reason in of(odd, "9").reasons][:1] == ["unchanged"]


@needs_x86
def test_widths_off_the_multiple_are_named_as_the_reason(odd: LayerReport) -> None:
    cut = of(odd, "4")
    assert cut.dense.layouts == {"NCHWc"}
    assert cut.sparse.layouts == {"plain"}
    width = [reason for reason in cut.reasons if reason.kind == "width"]
    assert len(width) == 1
    assert width[0].text.startswith("61 channels read are no multiple of 4, so not in the NCHWc layout: ")
    assert width[0].ms > 0
    table = odd.table()
    line = next(row for row in table.rows if row[0] == "4")
    assert line[1] == "128→128 3×3 ⇒ 61→61 3×3"
    assert "no multiple of 4" in line[-1]


@needs_x86
def test_aligned_widths_are_not(engines) -> None:
    report = profile_layers(engines[128], engines[64], seconds=0.05, rounds=3)
    for layer in ("2", "4", "6"):
        assert "width" not in [reason.kind for reason in of(report, layer).reasons]
        assert of(report, layer).sparse.layouts == {"NCHWc"}


def test_the_table_alone_and_other_batches(engines) -> None:
    table = profile_layers(engines[128], engines[64].folder, 3, seconds=0.01, rounds=1).table(2)
    assert table.title == "Layers at batch 3"
    assert table.columns == ("layer", "shape", "dense ms", "share", "sparse ms", "speed-up", "by MACs", "why")
    assert [row[0] for row in table.rows][-1] == "all layers"
    assert table.rows[2][0].endswith(" others")


def test_an_engine_against_itself_is_unchanged(engines) -> None:
    report = profile_layers(engines[64], engines[64], 2, seconds=0.01, rounds=1)
    assert report.batch == 2
    for layer in ("0", "2", "4", "6", "9"):
        assert of(report, layer).predicted == 1
        assert of(report, layer).reasons[0].kind == "unchanged"


def test_a_batch_out_of_range_other_targets_and_no_rounds_are_refused(engines, tmp_path: Path) -> None:
    other = load_target("cpu").model_copy(update={"name": "two", "batch": Batch(min=1, opt=2, max=4)})
    moved = build_engine(network(64), other, torch.randn(2, 3, 24, 24), tmp_path, name="other")
    with pytest.raises(ConfigError) as caught:
        profile_layers(engines[64], moved)
    assert caught.value.given == "the engines were built for different targets: cpu and two"
    with pytest.raises(EngineError, match="batch"):
        profile_layers(engines[64], engines[64], 1000)
    with pytest.raises(ConfigError, match="rounds is 0"):
        profile_layers(engines[64], engines[64], rounds=0)


def test_an_engine_that_does_not_run_here_says_why(engines, monkeypatch) -> None:
    monkeypatch.setattr(Engine, "runnable", lambda self: "compiled, not timed here: no NVIDIA GPU")
    with pytest.raises(EngineError) as caught:
        profile_layers(engines[64], engines[64])
    assert "cannot be profiled: compiled, not timed here: no NVIDIA GPU" in caught.value.given


def test_the_verb_prints_the_table_or_json(engines, capsys) -> None:
    words = ["layers", f"dense={engines[128].folder}", f"half={engines[64].folder}", "--seconds", "0.05"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "by MACs" in text
    assert "128→128 3×3 ⇒ 64→64 3×3" in text
    assert "half: layers add up to" in text
    assert main([*words, "--json", "--batch", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batch"] == 2
    assert found["engines"]["sparse"]["name"] == "half"
    assert sum(layer["sparse"]["ms"] for layer in found["layers"] if "sparse" in layer) == pytest.approx(
        found["engines"]["sparse"]["layers_ms"]
    )
    layer = next(layer for layer in found["layers"] if layer["layer"] == "4")
    assert layer["by_macs"] == 4.0
    assert layer["dense"]["counts"] == [[128, 128]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a=x", "a=y"], "both engines have one name"),
        (["a=x", "b=y", "--rows", "0"], "2.5 seconds and 0 rows"),
        (["a=x", "b"], "'b' is no subject"),
    ],
)
def test_the_verb_refuses_what_it_cannot_do(words: list[str], message: str, capsys) -> None:
    assert main(["layers", *words]) == 2
    assert message in capsys.readouterr().err


@needs_x86
@pytest.mark.slow
def test_reasons_on_a_zoo_network_cut_with_and_without_alignment(tmp_path: Path) -> None:
    """ResNet-20 with 45 % of its channels, as they fall and in multiples of 16."""
    from deploy_sparse.api import oneshot_ticket
    from deploy_sparse.surgery.compact import compact
    from deploy_sparse.ticket import ModelRef

    def dense() -> nn.Module:
        torch.manual_seed(0)
        return zoo.build("resnet20").eval()

    images = torch.randn(2, *zoo.entry("resnet20").input_shape)
    ticket = replace(oneshot_ticket(dense(), images, "channels", 0.55), model=ModelRef("user factory", {}))
    folders = {"dense": build_engine(dense(), "cpu", images, tmp_path, name="dense").folder}
    for multiple in (1, 16):
        made = compact(ticket, dense, images, multiple=multiple, format="channels")
        folders[str(multiple)] = build_engine(made.module, "cpu", images, tmp_path, name=f"by-{multiple}").folder
    unaligned, aligned = (
        profile_layers(open_entry(folders["dense"]), folders[key], seconds=0.2) for key in ("1", "16")
    )
    named: dict[bool, int] = {True: 0, False: 0}
    for pair in (*unaligned.pairs, *aligned.pairs):
        if pair.sparse is None or not pair.sparse.layouts:
            continue  # no convolution
        off = any(read % 4 and read > 16 for read, _ in pair.sparse.work.counts)
        texts = [reason.text for reason in pair.reasons if "no multiple of 4" in reason.text]
        assert bool(texts) == off, (pair.name, pair.sparse.work.counts, pair.reasons)
        named[off] += 1
    assert named[True] >= 5
    assert named[False] >= 15


def test_the_pages_example_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "layers.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs/layers.md", "exec"), {})
    text = capsys.readouterr().out
    assert "64→64 3×3 ⇒ 29→29 3×3" in text
    assert ("29 channels read are no multiple of 4" in text) == X86
