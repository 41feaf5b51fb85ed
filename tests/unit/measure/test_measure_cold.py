"""Cold caches: how much is read, by which processor, on machines as Linux describes them."""

import os
import threading

import numpy as np
import pytest

from deploy_sparse.errors import ConfigError
from deploy_sparse.measure import cold
from deploy_sparse.measure.cold import Cache, Evictor, bytes_to_read, caches_of

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def machine(tmp_path):
    """Four processors: a first and second level of their own, a third level for each two."""
    for cpu in range(4):
        pair = "0-1" if cpu < 2 else "2-3"
        levels = (
            ("1", "Data", "48K", str(cpu)),
            ("1", "Instruction", "32K", str(cpu)),
            ("2", "Unified", "1024K", str(cpu)),
            ("3", "Unified", "32M", pair),
        )
        for index, (level, kind, size, shared) in enumerate(levels):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, value in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
                (folder / name).write_text(f"{value}\n")
    return tmp_path


def test_caches_are_read_as_linux_lists_them(machine):
    assert caches_of(2, machine) == (Cache(1, 48 * KIB, (2,)), Cache(2, MIB, (2,)), Cache(3, 32 * MIB, (2, 3)))


def test_each_cache_is_replaced_twice_over_by_those_that_share_it(machine):
    assert bytes_to_read([0], machine) == {0: 64 * MIB}
    assert bytes_to_read([0, 1], machine) == {0: 32 * MIB, 1: 32 * MIB}
    assert bytes_to_read([0, 1, 2], machine) == {0: 32 * MIB, 1: 32 * MIB, 2: 64 * MIB}


def test_cache_of_ones_own_is_replaced_though_many_share_the_last_level(machine):
    for cpu in (0, 1):
        (machine / f"cpu{cpu}" / "cache" / "index3" / "size").write_text("1536K\n")
    assert bytes_to_read([0, 1], machine) == {0: 2 * MIB, 1: 2 * MIB}  # 768 KiB each would leave the second level


def test_machine_that_does_not_tell_is_refused(machine):
    (machine / "cpu1" / "cache" / "index3" / "size").unlink()
    assert [cache.level for cache in caches_of(1, machine)] == [1, 2]
    for cpus in ([9], [0, 9], []):
        with pytest.raises(ConfigError, match=r"caches are not known(.|\n)*measure with warm caches"):
            bytes_to_read(cpus, machine)


def test_every_processor_reads_its_share_on_itself_and_pages_are_real(machine, monkeypatch):
    placed, read = {}, []
    monkeypatch.setattr(
        cold.os, "sched_setaffinity", lambda pid, cpus: placed.update({threading.get_ident(): (pid, *cpus)})
    )
    for cpu in range(4):
        (machine / f"cpu{cpu}" / "cache" / "index3" / "size").write_text("64K\n")
        (machine / f"cpu{cpu}" / "cache" / "index2" / "size").write_text("16K\n")

    class Buffer(np.ndarray):
        def sum(self):
            read.append((placed[threading.get_ident()], self.nbytes, int(np.asarray(self).sum())))

    monkeypatch.setattr(cold.np, "ones", lambda count, dtype: np.full(count, 1, dtype).view(Buffer))
    with Evictor([0, 1, 2], machine) as evict:
        assert evict.bytes == (96 + 96 + 128) * KIB
        evict()
        evict()
    # all threads have ended their reading when the call returns; each is where it was put
    assert sorted(read) == sorted(
        2 * [((0, cpu), size, size // 8) for cpu, size in ((0, 96 * KIB), (1, 96 * KIB), (2, 128 * KIB))]
    )
    assert len(placed) == 3


def test_threads_end_and_failures_reach_the_caller(machine, monkeypatch):
    class Broken:
        def sum(self):
            raise MemoryError("broken memory")

    monkeypatch.setattr(cold.os, "sched_setaffinity", lambda *_: None)
    (machine / "cpu0" / "cache" / "index3" / "size").write_text("64K\n")
    before = threading.active_count()
    with Evictor([0], machine) as evict:
        evict()
        assert threading.active_count() == before + 1
        monkeypatch.setattr(evict, "_buffers", [Broken()])
        with pytest.raises(MemoryError, match="broken memory"):
            evict()
    assert threading.active_count() == before


def test_calls_between_evictions_find_cold_caches_here():
    """On this machine: memory that fits the caches is read more slowly after an eviction."""
    from deploy_sparse.measure.interleave import interleave

    cpus = sorted(os.sched_getaffinity(0))
    if not all(caches_of(cpu) for cpu in cpus):
        pytest.skip("the sizes of the caches are not known here")
    values = np.ones(16 * KIB, np.int64)  # 128 KiB

    def typical(before_each):
        way = {"warmup_ms": 1, "duration_s": 1e-3, "min_iterations": 15, "block_ms": 1e-3}
        taken = interleave({"a": values.sum}, before_each=before_each, **way)["a"]
        return min(min(block) for block in taken.blocks_ms)

    with Evictor(cpus) as evict:
        assert typical(evict) > 1.2 * typical(None)
