"""Block convolutions in torch programs: found, folded, put into the kernel, and timed before they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_samples
from torch import nn
from torch.fx import GraphModule
from torch_samples import EXAMPLES, Equal, make_blocks, target_of

from deploy_sparse.engine.pytorch import choice as _torch_choice
from deploy_sparse.engine.pytorch.blocks import BlockLayer, Site, find_sites, replaced
from deploy_sparse.engine.pytorch.choice import BlockChoice, with_block_kernels
from deploy_sparse.engine.pytorch.fold import fold_batchnorm_
from deploy_sparse.engine.pytorch.graph import call_flat, flat_module, loosen_views_, pruned, writes_inputs
from deploy_sparse.errors import MissingDependencyError
from deploy_sparse.programs.program import program_bytes, read_bytes
from deploy_sparse.surgery.packed_conv import PackedConv2d
from deploy_sparse.surgery.packing import packing_of


def program_of(network: nn.Module, *inputs: torch.Tensor) -> GraphModule:
    data = program_bytes(network.eval(), inputs, otherwise="")
    return flat_module(read_bytes(data, "x.pt2", remake=""))


X = torch.randn(2, 32, 5, 5, generator=torch.Generator().manual_seed(2))


class Native(BlockLayer):
    """Stands in for the kernel: the masked dense convolution that the layout's site says."""

    def __init__(self, site) -> None:
        nn.Module.__init__(self)
        self.site = site

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.masked(x)

    def masked(self, x: torch.Tensor) -> torch.Tensor:
        site, mask = self.site, torch.zeros_like(self.site.weight)
        for rows, columns in site.blocks:
            mask[torch.tensor(rows)[:, None], torch.tensor(columns)] = 1
        stride, padding, dilation = site.geometry
        y = F.conv2d(x, site.weight * mask, site.bias, stride, padding, dilation)
        y = y if site.order is None else y[:, site.order]
        return y.relu() if site.relu else y


def stand_in(monkeypatch: pytest.MonkeyPatch, spoil=lambda y: y) -> None:
    """Let the kernel's layers compute what their sites say without the kernel."""
    layout = Site.layout
    sites = {}

    def remembered(site):
        made = layout(site)
        sites[id(made)] = (made, Native(site))
        return made

    monkeypatch.setattr(Site, "layout", remembered)
    monkeypatch.setattr(BlockLayer, "forward", lambda self, x: spoil(sites[id(self.layout)][1].masked(x)))


@pytest.fixture
def program() -> GraphModule:
    module = program_of(make_blocks(), EXAMPLES)
    fold_batchnorm_(module)
    return module


@torch.no_grad()
def test_sites_of_every_form_are_found_and_computed_elsewhere(program: GraphModule) -> None:
    before = call_flat(program, [EXAMPLES])[0]
    sites = find_sites(program)
    sizes = [[(len(rows), len(columns)) for rows, columns in site.blocks] for site in sites]
    equal = [(16, 16), (16, 15)]  # a channel that is read twice is one column
    assert sizes == [equal, equal, [(16, 16), (20, 32), (28, 17)], [(16, 32)] * 2]
    assert [site.relu for site in sites] == [True, True, False, True]
    assert [site.order is not None for site in sites] == [False, True, False, False]
    assert [site.bias is not None for site in sites] == [True, False, True, True]
    for site in sites:
        x = torch.randn(site.input_shape(2))
        expected = Native(site)(x)
        assert torch.allclose(site.native(program)(x), expected, atol=1e-5)
    after = replaced(program, [(site, Native(site)) for site in sites])
    assert torch.allclose(call_flat(after, [EXAMPLES])[0], before, atol=1e-5)
    kinds = [str(node.target) for node in after.graph.nodes if node.op == "call_function"]
    assert kinds.count("aten.conv2d.default") == 3  # the dense one, the depthwise one, and groups of 8
    assert not any("index_select" in kind or "aten.cat" in kind for kind in kinds)
    assert not {name for name, _ in after.named_parameters()} & {"disjoint.weight", "free.bias"}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Answers of a process of its own, in which Triton interprets."""
    pytest.importorskip("triton", reason="needs Triton, which comes with PyTorch for Linux")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, torch_samples.__file__, str(tmp_path_factory.mktemp("interpreted"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def test_an_engine_runs_its_blocks_in_the_kernel(interpreted: dict) -> None:
    choices = interpreted["always choices"]
    assert len(choices) == 4
    assert all(choice.endswith(": block kernel, as the target asks") for choice in choices)
    expected = np.array(interpreted["module"])
    for wanted in ("never", "timed", "always"):
        np.testing.assert_allclose(interpreted[wanted], expected, atol=1e-5 * np.abs(expected).max())
    assert interpreted["never"] == interpreted["timed"] != interpreted["always"]  # sums in another order
    assert interpreted["never choices"] == interpreted["timed choices"] == []


def test_the_cpu_keeps_the_native_form_without_the_interpreter(program: GraphModule) -> None:
    kept, choices = with_block_kernels(program, target_of(block_kernel="always"))
    assert kept is program
    assert {choice.kernel for choice in choices} == {False}
    assert "native form, the kernel runs on a GPU" in str(choices[0])
    assert with_block_kernels(program, target_of()) == (program, ())


@pytest.mark.parametrize(("kernel_ms", "faster"), [(0.97, True), (0.99, False), (1.5, False)])
def test_a_gpu_takes_what_was_faster(kernel_ms: float, faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With clock and kernel replaced: two layers of one kind are timed once."""
    torch.manual_seed(0)
    module = program_of(nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1, groups=2) for _ in range(2))), X)
    timed: list[torch.Size] = []

    def medians(calls, x, *, graphs):
        timed.append(x.shape)
        assert graphs
        return [1.0, kernel_ms]

    monkeypatch.setattr(_torch_choice, "_medians", medians)
    monkeypatch.setattr(_torch_choice, "_missing", lambda *_: None)
    stand_in(monkeypatch)
    made, choices = with_block_kernels(module, target_of(device="cuda", cuda_graph=True, batch={"opt": 4}))
    assert [choice.kernel for choice in choices] == [faster] * 2
    assert (choices[0].native_ms, choices[0].kernel_ms) == (1.0, kernel_ms)
    assert timed == [(4, 32, 5, 5)]
    assert (made is module) == (not faster)


def test_a_kernel_that_fails_or_is_wrong_is_not_taken(program: GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch_choice, "_missing", lambda *_: None)
    monkeypatch.setattr(_torch_choice, "_medians", lambda *_, **__: pytest.fail("timed"))
    target = target_of(device="cuda")

    def fails(self, x):
        raise RuntimeError("out of resource: shared memory\nmore")

    monkeypatch.setattr(BlockLayer, "forward", fails)
    kept, choices = with_block_kernels(program, target)
    assert kept is program
    assert choices[0] == BlockChoice(
        choices[0].layer, False, "the kernel does not run here: out of resource: shared memory"
    )
    stand_in(monkeypatch, lambda y: y * 1.001)
    _, choices = with_block_kernels(program, target)
    assert {choice.reason for choice in choices} == {"the kernel is off by 1.0e-03 of the largest output"}
    large = with_block_kernels(program, target_of(device="cuda", batch={"max": 10**9}))[1]
    assert {choice.reason for choice in large} == {"the largest batch is too large for the kernel's indices"}


def test_without_triton_the_native_form_stays_unless_the_kernel_was_asked_for(
    program: GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing():
        raise MissingDependencyError("triton is not there", expected="Triton", fix="pip install triton")

    monkeypatch.setattr(_torch_choice, "triton_kernel", missing)
    assert {choice.reason for choice in with_block_kernels(program, target_of(device="cuda"))[1]} == {
        "triton is not there"
    }
    with pytest.raises(MissingDependencyError):
        with_block_kernels(program, target_of(device="cuda", block_kernel="always"))


@torch.no_grad()
@pytest.mark.parametrize("form", ["disjoint", "equal", "free"])
def test_packed_layers_of_surgery_are_sites(form: str) -> None:
    torch.manual_seed(0)
    mask = torch.zeros(64, 64, 1, 1, dtype=torch.bool)
    columns = {
        "disjoint": [list(range(32)), list(range(32, 64))],
        "equal": [list(range(32)), list(range(16, 48))],
        "free": [list(range(32)), list(range(16, 64))],
    }[form]
    for number, read in enumerate(columns):
        mask[torch.arange(number, 64, 2)[:, None], torch.tensor(read)] = True
    mask = mask.expand(64, 64, 3, 3)
    weight = torch.randn(64, 64, 3, 3) * mask
    packing = packing_of(mask)
    assert packing is not None
    assert packing.form == form
    layer = PackedConv2d.pack(weight, torch.randn(64), packing, padding=1)
    x = torch.randn(2, 64, 5, 5)
    module = program_of(nn.Sequential(layer, nn.ReLU()), x)
    (site,) = find_sites(module)
    assert site.relu
    assert sum(len(rows) * len(read) for rows, read in site.blocks) == int(mask[:, :, 0, 0].sum())
    after = replaced(module, [(site, Native(site))])
    assert torch.allclose(call_flat(after, [x])[0], layer(x).relu(), atol=1e-5)
    assert [node.op for node in after.graph.nodes] == ["placeholder", "call_module", "output"]


class InARow(nn.Module):
    """Two layers of blocks with one look-up between them, which both would take: rows of one, columns of the other."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.register_buffer("places", torch.randperm(first.out_channels)[: second.in_channels])

    def forward(self, x):
        y = self.first(x).index_select(1, self.places)
        if self.second.groups > 1:
            return self.second(y)
        one, two = (F.conv2d(y, self.second.weight.narrow(0, row, 16), padding=1) for row in (0, 16))
        return torch.cat([one, two], 1)


@torch.no_grad()
@pytest.mark.parametrize(("groups", "reads"), [(2, 32), (1, 24)])
def test_a_look_up_between_two_sites_belongs_to_one_of_them(groups: int, reads: int) -> None:
    torch.manual_seed(0)
    network = InARow(nn.Conv2d(32, 32, 1, groups=2), nn.Conv2d(reads, 32, 3, padding=1, groups=groups, bias=False))
    module = program_of(network, X)
    sites = find_sites(module)
    assert len(sites) == 2
    nodes = [node for site in sites for node in site.nodes]
    assert len({*nodes}) == len(nodes)
    after = replaced(module, [(site, Native(site)) for site in sites])
    assert torch.allclose(call_flat(after, [X])[0], network(X), atol=1e-5)


class Shared(nn.Module):
    """What looks like a site and is none, or whose neighbours must stay."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = Equal(), kind

    def forward(self, x, weight=None):
        if self.kind == "given weight":
            return F.conv2d(x.index_select(1, self.inner.columns), weight[0], padding=1, groups=2)
        if self.kind == "written index":
            self.inner.columns.add_(0)
        y = self.inner(x)
        if self.kind == "two readers":
            return y.relu() + y
        return y


@torch.no_grad()
def test_what_is_no_site() -> None:
    x = X
    assert not find_sites(program_of(Shared("given weight"), x, torch.randn(2, 32, 16, 3, 3)))
    (site,) = find_sites(program_of(Shared("written index"), x))
    assert site.source.target is torch.ops.aten.index_select.default  # the groups alone
    (site,) = find_sites(program_of(Shared("two readers"), x))
    assert not site.relu
    for layer in (nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 32, 3, groups=8)):
        assert not find_sites(program_of(layer, x))
    assert len(find_sites(program_of(nn.Conv2d(32, 32, 3, groups=2), x))) == 1
    assert not find_sites(program_of(nn.Conv2d(32, 32, 3, groups=2).double(), x.double()))


class TwoReaders(nn.Sequential):
    def forward(self, x):
        y = self[0](x)
        return self[1](y) + y


@torch.no_grad()
@pytest.mark.parametrize(
    ("network", "folded"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 1),
        (nn.Sequential(nn.Conv2d(3, 4, 3, bias=False, stride=2), nn.BatchNorm2d(4, affine=False), nn.ReLU()), 1),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), 0),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), 0),
        (TwoReaders(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 0),
    ],
)
def test_batchnorms_are_folded_where_they_alone_read_a_convolution(network: nn.Module, folded: int) -> None:
    torch.manual_seed(0)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None:
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
            if part.affine:
                part.weight.uniform_(-2, 2)
                part.bias.normal_()
    x = torch.randn(2, 3, 6, 6)
    module = program_of(network, x)
    expected = call_flat(module, [x])[0]
    assert fold_batchnorm_(module) == folded
    assert torch.allclose(call_flat(module, [x])[0], expected, atol=1e-5)
    kept = sum("batch_norm" in str(node.target) for node in module.graph.nodes)
    assert kept == 1 - folded


def graph_of(function, *inputs: torch.Tensor) -> torch.fx.Graph:
    class Net(nn.Module):
        def forward(self, *inputs):
            return function(*inputs)

    return flat_module(torch.export.export(Net(), inputs)).graph


@pytest.mark.parametrize(
    ("function", "writes"),
    [
        (lambda x: x.relu_(), True),
        (lambda x: x.view(-1).add_(1), True),
        (lambda x: x.contiguous().flatten(1).mul_(2), True),
        (lambda x: F.dropout(x, training=False).transpose(0, 1).add_(1), True),
        (lambda x: x.relu().add_(1), False),
        (lambda x: (x + 1).view(-1).add_(x.view(-1)), False),
        (lambda x: x.clone().relu_(), False),
        (torch.enable_grad()(lambda x: x.relu_()), True),
    ],
)
def test_programs_that_write_into_their_inputs_are_known(function, writes: bool) -> None:
    with torch.no_grad():
        graph = graph_of(function, torch.randn(2, 3, 4))
    assert writes_inputs(graph) == writes


class Counts(nn.Module):
    """Writes whose results nobody takes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.conv, self.unread = nn.Conv2d(3, 3, 1), nn.Parameter(torch.zeros(9))

    def forward(self, x):
        y = self.conv(x)
        _ = self.unread + 1
        F.relu_(y)
        return y


@torch.no_grad()
def test_pruning_leaves_what_writes() -> None:
    x = torch.randn(2, 3, 4, 4)
    module = program_of(Counts(), x)
    expected = call_flat(module, [x])[0]
    after = pruned(module)
    assert torch.equal(call_flat(after, [x])[0], expected)
    assert float(expected.min()) == 0
    assert {*dict(after.named_parameters()), *dict(after.named_buffers())} == {"conv.weight", "conv.bias"}


@torch.no_grad()
def test_views_of_channels_last_activations_copy_where_they_must() -> None:
    class Views(nn.Module):
        def forward(self, x):
            return x.relu().view(x.shape[0], -1)

    x = torch.randn(2, 3, 4, 5)
    inner = x.contiguous(memory_format=torch.channels_last)
    module = program_of(Views(), x)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        call_flat(module, [inner])
    loosen_views_(module)
    assert torch.equal(call_flat(module, [inner])[0], x.relu().flatten(1))
