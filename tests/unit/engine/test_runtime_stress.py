"""Many requests of mixed batch from many threads on one engine: all results right, resident memory flat."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from deploy_sparse.engine.entry import Engine

PAGE = 4096


def resident_bytes() -> int:
    """Physical memory of this process that it shares with nobody, in bytes."""
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * PAGE


def serve(folder: str, threads: int, requests: int, leak: int) -> dict[str, float]:
    """Run ``requests`` per thread, a fifth of them as a warm-up; ``leak``: bytes that each run keeps, as a bug would.

    Returns:
        ``wrong``: results that differ from those of one thread alone; ``growth``: of resident memory from the end of
        the warm-up to the end, as a share.
    """
    import gc
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    import deploy_sparse

    kept: list[bytearray] = []
    with deploy_sparse.load_engine(folder) as engine:
        feeds = [engine.sample_inputs(batch, seed=batch) for batch in range(1, 17)]
        alone = [engine.run(feed)["output"] for feed in feeds]
        given = [{"output": np.empty_like(alone[-1])} for _ in range(threads)]

        def work(thread: int, count: int) -> int:
            choose, wrong = np.random.default_rng(thread), 0
            for index, which in enumerate(choose.integers(0, len(feeds), count)):
                out = given[thread] if which == len(feeds) - 1 and index % 2 else None
                found = engine.run(feeds[which], out)["output"]
                wrong += not np.array_equal(found, alone[which])
                if leak:
                    kept.append(bytearray(b"x" * leak))
            return wrong

        def look() -> int:
            gc.collect()
            return resident_bytes()

        with ThreadPoolExecutor(threads) as pool:

            def round_of(count: int) -> int:
                return sum(pool.map(work, range(threads), [count] * threads))

            wrong = round_of(requests // 5)
            before = look()
            wrong += round_of(requests - requests // 5)
            after = look()
    return {"wrong": wrong, "growth": after / before - 1}


def served(engine: Engine, threads: int, requests: int, leak: int = 0) -> dict[str, float]:
    """:func:`serve` in a process of its own, whose memory is nobody else's."""
    command = [sys.executable, __file__, str(engine.folder), str(threads), str(requests), str(leak)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_eight_threads_with_two_thousand_requests_each(built: Engine) -> None:
    found = served(built, 8, 2000)
    assert found["wrong"] == 0
    assert found["growth"] < 0.02


def test_the_check_sees_a_leak(built: Engine) -> None:
    """Of 128 bytes for each run."""
    found = served(built, 8, 2000, leak=128)
    assert found["wrong"] == 0
    assert found["growth"] > 0.02


if __name__ == "__main__":
    print(json.dumps(serve(sys.argv[1], *map(int, sys.argv[2:]))))
