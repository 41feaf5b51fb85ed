"""Processors are pinned for the time of a measurement, for all threads, and put back."""

import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy_sparse.errors import ConfigError
from deploy_sparse.measure import pinning
from deploy_sparse.measure.pinning import allowed_cpus, check_threads, cpu_list, cpus_in, pinned


class Worker:
    """A thread that waits; ``cpus()`` are those it may run on."""

    def __enter__(self):
        self._end, started = threading.Event(), threading.Event()

        def wait():
            self.id = threading.get_native_id()
            started.set()
            self._end.wait()

        self._thread = threading.Thread(target=wait)
        self._thread.start()
        started.wait()
        return self

    def cpus(self):
        return os.sched_getaffinity(self.id)

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()


@pytest.fixture
def one():
    return min(os.sched_getaffinity(0))


def test_all_threads_are_pinned_and_put_back(one):
    before = os.sched_getaffinity(0)
    with Worker() as old:
        with pinned([one]):
            assert allowed_cpus() == (one,)
            assert old.cpus() == {one}
            new = Worker().__enter__()
            assert new.cpus() == {one}
        assert old.cpus() == new.cpus() == os.sched_getaffinity(0) == before
        new.__exit__()


def test_threads_get_back_their_own_processors():
    """With stand-ins for Linux's calls: a thread that was pinned elsewhere, and two that end meanwhile: 14 at once, 13 later."""
    pinned_here = {11: {0, 1}, 12: {1}, 13: {0, 1}}

    class Tasks:
        @staticmethod
        def is_dir():
            return True

        @staticmethod
        def iterdir():
            return [type("Entry", (), {"name": str(thread)}) for thread in (*pinned_here, 14)]

    def get(thread):
        if thread == 14:
            raise ProcessLookupError
        return set(pinned_here[thread or 11])

    def put(thread, cpus):
        if thread in (14, 13):
            pinned_here.pop(thread, None)
            raise ProcessLookupError
        pinned_here[thread or 11] = set(cpus)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pinning, "_TASKS", Tasks)
        patch.setattr(pinning.os, "sched_getaffinity", get)
        patch.setattr(pinning.os, "sched_setaffinity", put)
        with pinned([0]):
            assert pinned_here == {11: {0}, 12: {0}}
            pinned_here[15] = {0}  # a thread that starts meanwhile and stays
        assert pinned_here == {11: {0, 1}, 12: {1}, 15: {0, 1}}


def test_threads_are_put_back_after_an_error(one):
    before = os.sched_getaffinity(0)
    with pytest.raises(KeyboardInterrupt), pinned([one]):
        raise KeyboardInterrupt
    assert os.sched_getaffinity(0) == before


def test_none_leaves_all_as_it_is():
    before = os.sched_getaffinity(0)
    with pinned(None):
        assert os.sched_getaffinity(0) == before


def test_processors_that_are_not_there_are_refused(one):
    before = os.sched_getaffinity(0)
    for cpus in ([4000], [one, 4000]):  # Linux would take the second and leave 4000 out
        with (
            pytest.raises(ConfigError, match=r"may not use all of the processors .*4000\n(.|\n)*may run on \d"),
            pinned(cpus),
        ):
            raise AssertionError("it was pinned")
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize("cpus", [[], [0, 0], [-1], [1.5], [True], "01", 3])
def test_bad_processors_are_refused(cpus):
    with pytest.raises(ConfigError, match=r"the processors are (.|\n)*give for example 0 1"), pinned(cpus):
        raise AssertionError("it was pinned")


def test_system_that_cannot_pin_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(pinning, "_TASKS", tmp_path / "none")
    with pytest.raises(ConfigError, match=r"does not let a process choose its processors"), pinned([0]):
        raise AssertionError("it was pinned")
    monkeypatch.delattr(pinning.os, "sched_getaffinity")
    assert allowed_cpus() is None


def test_more_threads_than_processors_are_refused():
    with pytest.raises(ConfigError, match=r"4 threads on 2 processors(.|\n)*threads = 4"):
        check_threads([0, 1], 4)
    check_threads([0, 1], 2)
    check_threads([0, 1], None)
    check_threads(None, 4)


def test_lists_are_written_as_linux_writes_them():
    assert cpu_list([8, 0, 1, 2, 3]) == "0-3,8"
    assert cpu_list([5]) == "5"
    assert cpus_in("0-3,8\n") == (0, 1, 2, 3, 8)
    assert cpus_in("\n") == ()


@given(st.sets(st.integers(0, 300), min_size=1))
def test_lists_are_read_back(cpus):
    assert cpus_in(cpu_list(cpus)) == tuple(sorted(cpus))
