"""The block kernel in Triton's interpreter against float64, and what its compiler makes of it for GPUs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import block_kernel_cases
import pytest
import torch
from block_kernel_cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st

import deploy_sparse.engine.blocks
from deploy_sparse.engine.blocks.kernel import block_conv2d
from deploy_sparse.engine.blocks.layout import prepare
from deploy_sparse.errors import EngineError, MissingDependencyError

Run = Callable[[Case], dict]
PLAIN = Case(2, 24, 20, (6, 5), (3, 3), [([0, 2, 4, 7], [1, 2, 3, 9]), ([1, 3, 5], list(range(8, 24)))], padding=(1, 1))


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Run]:
    """Runs cases in a process of its own, in which Triton interprets."""
    pytest.importorskip("triton", reason="needs Triton, which comes with PyTorch for Linux")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, block_kernel_cases.__file__]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as worker:
        assert json.loads(worker.stdout.readline()) is False, "importing kernel and layout imports Triton"

        def run(case: Case) -> dict:
            worker.stdin.write(json.dumps(asdict(case)) + "\n")
            worker.stdin.flush()
            return json.loads(worker.stdout.readline())

        yield run
        worker.stdin.close()


def check(answer: dict, case: Case) -> None:
    assert "problem" not in answer, answer
    assert answer["shape"] == list(case.expected()[0].shape)
    assert answer["finite"]
    assert answer["worst"] <= 1
    assert answer["channels_last"]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    pair = lambda least, most: st.tuples(st.integers(least, most), st.integers(least, most))  # noqa: E731
    form = draw(st.sampled_from(["equal", "free", "runs"]))
    channels = draw(st.sampled_from([8, 16, 32])) if form == "runs" else draw(st.integers(1, 37))
    if form == "free":
        rows = draw(st.integers(1, 37))
        owner = draw(st.lists(st.integers(-1, 2), min_size=rows, max_size=rows))
        groups = [[row for row in range(rows) if owner[row] == number] for number in range(3)]
        taken = [sorted(draw(st.sets(st.integers(0, channels - 1)))) for _ in groups]
    else:
        count, height = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8, 17]))
        rows = count * height
        groups = [list(range(number, rows, count)) for number in range(count)]
        run = 8 if form == "runs" else 1
        width = draw(st.integers(1, channels // run))
        starts = st.sets(st.integers(0, channels // run - 1), min_size=width, max_size=width)
        taken = [sorted(run * s + lane for s in draw(starts) for lane in range(run)) for _ in groups]
    kernel, dilation, padding = draw(pair(1, 3)), draw(pair(1, 2)), draw(pair(0, 2))
    extent = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = draw(st.tuples(*(st.integers(least, least + 5) for least in extent)))
    order = draw(st.none() | st.permutations(range(rows)).map(lambda p: p[: max(1, 2 * rows // 3)]))
    tiles = [(16, 16, 16), (32, 16, 16), (16, 32, 16), (64, 64, 16)]
    return Case(
        draw(st.integers(0, 3)), channels, rows, size, kernel, list(zip(groups, taken, strict=True)),
        stride=draw(pair(1, 3)), padding=padding, dilation=dilation,
        dtype=draw(st.sampled_from(["float32", "float16", "bfloat16"])),
        bias=draw(st.booleans()), relu=draw(st.booleans()), channels_last=draw(st.booleans()), order=order,
        column_tile=draw(st.sampled_from([16, 32])), tile=draw(st.none() | st.sampled_from(tiles)),
    )  # fmt: skip


@given(case=cases())
@settings(max_examples=30, deadline=None)
def test_any_block_convolution_equals_the_masked_dense_one(interpreted: Run, case: Case) -> None:
    check(interpreted(case), case)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"dtype": "float16", "relu": True},
        {"dtype": "bfloat16"},
        {"tile": (16, 16, 16)},
        {"column_tile": 32, "tile": (16, 16, 32)},
        {"blocks": []},
        {"blocks": [([], [0, 1]), ([4, 5], []), ([0], [23])]},
        {"blocks": [(list(range(20)), list(range(24)))], "stride": (2, 1), "dilation": (1, 2)},
        {"blocks": [(list(range(20)), list(range(24)))], "nan": True, "relu": True},
        {"order": [7, 19, 2]},
        {"batch": 0},
    ],
    ids=str,
)
def test_chosen_block_convolutions(interpreted: Run, change: dict) -> None:
    case = replace(PLAIN, **change)
    check(interpreted(case), case)


def test_a_wrong_answer_would_be_seen(interpreted: Run) -> None:
    """The tolerance is finer than one weight, one channel or the bias."""
    exact, allowed = PLAIN.expected()
    for wrong in (
        replace(PLAIN, bias=False),
        replace(PLAIN, blocks=[([0, 2, 4, 7], [1, 2, 3, 10]), PLAIN.blocks[1]]),
        replace(PLAIN, blocks=[([0, 2, 4], [1, 2, 3, 9]), PLAIN.blocks[1]]),
    ):
        assert float(((wrong.expected()[0] - exact).abs() / allowed).max()) > 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (6, 0), "padding": (1, 0)}, "EngineError: the input is 6 × 0\n  expected: at least the extent of the 3 × 3 kernel"),
        ({"tile": (16, 16, 32)}, "EngineError: the tile takes 32 columns\n  expected: a divisor of the layout's step, 16"),
    ],
    ids=["too small", "tile"],
)  # fmt: skip
def test_what_the_kernel_refuses(interpreted: Run, change: dict, message: str) -> None:
    assert message in interpreted(replace(PLAIN, **change))["problem"]


def test_inputs_that_do_not_fit() -> None:
    layout, x = PLAIN.layout(), PLAIN.tensors()[0]
    for wrong, message in (
        (x[0], r"shape \[24, 6, 5\](.|\n)*expected: \[batch, 24, height, width\]"),
        (x[:, :23], r"shape \[2, 23, 6, 5\]"),
        (x.half(), "torch.float16 on cpu(.|\n)*expected: torch.float32 on cpu, like the layout"),
        (x.clone().requires_grad_(), "wants gradients(.|\n)*no backward(.|\n)*inference_mode"),
        (x[:1, :, :1, :1].expand(-1, -1, 2**14, 2**14), "expected: under .* numbers an image"),
    ):
        with pytest.raises(EngineError, match=message):
            block_conv2d(wrong, layout)


def test_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip(
        "deploy_sparse.engine.blocks.triton_kernel", reason="needs Triton", exc_type=ImportError
    )
    monkeypatch.setattr(triton, "INTERPRETED", False)
    with pytest.raises(EngineError, match=r"tensor on the CPU(.|\n)*TRITON_INTERPRET=1"):
        block_conv2d(PLAIN.tensors()[0], PLAIN.layout())


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "deploy_sparse.engine.blocks.triton_kernel", raising=False)
    monkeypatch.delattr(deploy_sparse.engine.blocks, "triton_kernel", raising=False)
    with pytest.raises(
        MissingDependencyError, match=r"triton is not there(.|\n)*pip install triton, or .* native form"
    ):
        block_conv2d(PLAIN.tensors()[0], PLAIN.layout())


@pytest.mark.parametrize(
    ("capability", "dtype", "instruction"),
    [(90, "fp16", "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16"), (89, "fp32", "mma.sync.aligned.m16n8k8.row.col.f32.tf32")],
)  # fmt: skip
def test_compiles_for_gpus_without_one(
    capability: int, dtype: str, instruction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor cores are used and 16 bytes are loaded at a time, and what TensorRT gets assembles."""
    triton = pytest.importorskip(
        "deploy_sparse.engine.blocks.triton_kernel", reason="needs Triton", exc_type=ImportError
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    weight = torch.zeros(256, 256, 3, 3, dtype=torch.float16 if dtype == "fp16" else torch.float32)
    shape = prepare(weight, [(range(b, 256, 4), range(64 * b, 64 * b + 64)) for b in range(4)], padding=1).shape
    constants, tile = tuple(shape.constants(tf32=True).items()), triton.Tile(64, 64, 32)
    ptx = triton.compile_ptx(constants, dtype, tile, capability)
    assert instruction in ptx.text
    assert len(re.findall(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", ptx.text)) >= 12
    assert str(Path(deploy_sparse.engine.__file__).parent) not in ptx.text
    size = 2 if dtype == "fp16" else 4
    assert ptx.threads == 128
    assert ptx.shared_bytes <= tile.shared_bytes(size) + 512
    entry = re.search(r"\.entry (\w+)\(([^)]*)\)", ptx.text)
    assert entry[1] == ptx.name
    kinds = [line.split()[1] for line in entry[2].strip().splitlines()]
    assert kinds == [".u64"] * 6 + [".u32"] * 10 + [".u64"]
    (tmp_path / "kernel.ptx").write_text(ptx.text)
    suffix = "a" if capability == 90 else ""
    assembler = triton.triton.knobs.nvidia.ptxas.path
    command = [assembler, "-v", f"--gpu-name=sm_{capability}{suffix}", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "0 bytes spill stores" in done.stderr


def test_ptx_that_uses_its_last_parameters_is_refused() -> None:
    triton = pytest.importorskip(
        "deploy_sparse.engine.blocks.triton_kernel", reason="needs Triton", exc_type=ImportError
    )
    ptx = ".entry f(\n\t.param .u64 f_param_0,\n\t.param .u64 f_param_1\n)\n{ ld.param.b64 %rd1, [f_param_0]; }"
    assert triton.without_parameters_after(ptx, 1) == ptx.replace(",\n\t.param .u64 f_param_1\n", "")
    for wrong, count in ((ptx.replace("[f_param_0]", "[f_param_1]"), 1), (ptx, 3), ("nothing", 1)):
        with pytest.raises(EngineError, match=r"entry point of \d parameters(.|\n)*native form"):
            triton.without_parameters_after(wrong, count)


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("step", [16, 32, 64, 128])
@pytest.mark.parametrize("max_rows", [1, 16, 17, 64, 512])
def test_some_tile_fits_every_layout(max_rows: int, step: int, element_bytes: int) -> None:
    triton = pytest.importorskip(
        "deploy_sparse.engine.blocks.triton_kernel", reason="needs Triton", exc_type=ImportError
    )
    found = triton.fitting(max_rows, step, element_bytes)
    assert found
    assert all(step % tile.columns == 0 and tile.columns * element_bytes <= 128 for tile in found)
    assert all(tile.rows < 2 * max(max_rows, 8) or tile.rows == 16 for tile in found)
    named = {"max_rows": max_rows, "x": torch.zeros(1, dtype={2: torch.float16, 4: torch.float32}[element_bytes])}
    timed = triton.tuned_kernel.early_config_prune(triton.tuned_kernel.configs, named, STEP=step)
    assert [config.kwargs for config in timed] == [tile.blocks() for tile in found]
    assert {"STEP", "max_rows"} <= set(triton.tuned_kernel.keys)  # or another layout's tile would be taken
