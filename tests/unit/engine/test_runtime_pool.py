"""Counting runs and lending contexts: nobody waits for ever, nothing is lost, closing waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from deploy_sparse.engine.pool import Gate, Pool
from deploy_sparse.errors import EngineError


def closed() -> EngineError:
    return EngineError("it is closed", expected="an open one", fix="open it")


def started(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_closing_a_gate_waits_for_calls_inside_and_turns_later_ones_away() -> None:
    gate, inside, leave, order = Gate(closed), threading.Event(), threading.Event(), []

    def call() -> None:
        with gate:
            inside.set()
            leave.wait(5)
            order.append("left")

    caller = started(call)
    assert inside.wait(5)
    closer = started(lambda: order.append(("closed", gate.close())))
    time.sleep(0.05)
    assert order == []
    with pytest.raises(EngineError, match="it is closed"), gate:
        raise AssertionError
    leave.set()
    for thread in (caller, closer):
        thread.join(5)
    assert order == ["left", ("closed", True)]
    assert gate.close() is False


def test_a_gate_lets_any_number_in_and_forgets_them_after_exceptions() -> None:
    gate = Gate(closed)
    with gate, gate, pytest.raises(ZeroDivisionError), gate:
        _ = 1 / 0
    assert gate.close() is True


def test_closing_from_inside_a_run_says_so_instead_of_waiting_for_ever() -> None:
    gate = Gate(closed)
    with gate:
        with pytest.raises(EngineError, match=r"called from inside a run(.|\n)*close after the run"):
            gate.close()
        with gate:  # it is still open
            pass
    assert gate.close() is True


def test_a_pool_lends_each_item_to_one_call_at_a_time() -> None:
    pool, held, most, lock = Pool(["a", "b", "c"], closed), set(), [], threading.Lock()

    def call() -> None:
        for _ in range(100):
            with pool.borrow() as item:
                with lock:
                    assert item not in held
                    held.add(item)
                    most.append(len(held))
                time.sleep(0.0001)
                with lock:
                    held.remove(item)

    threads = [started(call) for _ in range(8)]
    for thread in threads:
        thread.join(30)
    assert len(most) == 800
    assert max(most) == 3
    assert sorted(pool.close()) == ["a", "b", "c"]


def test_a_wanted_item_is_waited_for() -> None:
    pool, got = Pool(["a", "b"], closed), []
    with pool.borrow("a") as first:

        def call() -> None:
            with pool.borrow("a") as item:
                got.append(item)

        waiting = started(call)
        time.sleep(0.05)
        assert got == []
        with pool.borrow() as other:
            assert {first, other} == {"a", "b"}
    waiting.join(5)
    assert got == ["a"]


def test_an_exception_brings_the_item_back() -> None:
    pool = Pool(["only"], closed)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt), pool.borrow():
            raise KeyboardInterrupt
    assert pool.close() == ("only",)


def test_closing_a_pool_refuses_waiting_calls_and_waits_for_running_ones() -> None:
    pool, said, items = Pool(["only"], closed), [], []
    with pool.borrow():

        def call() -> None:
            try:
                with pool.borrow():
                    said.append("lent")
            except EngineError as problem:
                said.append(problem.given)

        waiting, closer = started(call), started(lambda: items.append(pool.close()))
        waiting.join(5)
        assert said == ["it is closed"]
        assert items == []
    closer.join(5)
    assert items == [("only",)]
    assert pool.close() == ()
    with pytest.raises(EngineError, match="it is closed"), pool.borrow():
        raise AssertionError


def test_a_close_that_was_interrupted_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(closed)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gate._condition, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gate.close()
    with pytest.raises(EngineError), gate:
        pass
    assert [gate.close(), gate.close()] == [True, False]
