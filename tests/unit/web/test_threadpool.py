"""Work in a thread returns and raises as if it ran in the caller."""

import threading

import pytest

from web.http.threadpool import LARGE, run_in_threadpool


@pytest.mark.parametrize(("size", "in_thread"), [(LARGE - 1, False), (LARGE, True)])
def test_only_large_inputs_use_a_thread(size: int, in_thread: bool) -> None:
    assert (run_in_threadpool(size, threading.get_native_id) != threading.get_native_id()) == in_thread


@pytest.mark.parametrize("size", [0, LARGE])
def test_an_exception_reaches_the_caller_and_is_not_printed(size: int, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        run_in_threadpool(size, lambda: 1 // 0)
    assert capfd.readouterr().err == ""
