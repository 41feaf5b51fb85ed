"""Timing a TensorRT engine on a GPU of host memory: both clocks, with and without transfers and CUDA graphs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from cuda_fakes import FakeGpu
from runtime_fakes import images, loader

from deploy_sparse.measure import profile as profile_module
from deploy_sparse.measure.profile import profile

WAY = {"warmup_ms": 0.1, "duration_s": 0.005, "block_ms": 0.2}


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("transfers", ["excluded", "included"])
def test_prepared_runs_are_timed_on_the_gpus_clock_too(
    monkeypatch: pytest.MonkeyPatch, transfers: str, cuda_graph: bool
) -> None:
    gpu = FakeGpu()
    monkeypatch.setattr(profile_module, "gpu_monitor", lambda: None)
    session = loader(gpu, monkeypatch)(cuda_graph=cuda_graph)
    runner = SimpleNamespace(
        manifest={"target": {"name": "tensorrt", "runtime": "tensorrt"}},
        sample_inputs=images,
        prepare=session.prepare,
        run=lambda feeds: session.run(feeds, {}),
    )
    found = profile({"dense": runner, "same": runner}, transfers=transfers, batches=(2, 5), **WAY)
    assert len(found.records) == 4
    for record in found.records:
        assert record.device_stats is not None
        assert record.device_stats.p50 == record.device_stats.max == 0.25  # what the stand-in's events say
        assert len(record.device_samples_ms) == len(record.samples_ms)
        assert (record.conditions.transfers, record.conditions.gpu) == (transfers, None)
    assert [comparison.device_ratio for comparison in found.comparisons] == [1, 1]
    assert bool(gpu.launches) == cuda_graph
    copies = len(gpu.named("cudaMemcpyAsync"))
    calls = sum(record.stats.count for record in found.records if record.stats is not None)
    assert (copies > calls) == (transfers == "included")
    session.close()
    assert (gpu.live, gpu.graphs, gpu.events) == ({}, set(), set())
