"""Heavy work in a thread: its answer and its errors come back as if it had been done here."""

import threading

import pytest

from web.http.threadpool import LARGE, run_in_threadpool


@pytest.mark.parametrize(("size", "elsewhere"), [(LARGE - 1, False), (LARGE, True)])
def test_only_large_work_is_worth_a_thread(size: int, elsewhere: bool) -> None:
    assert (run_in_threadpool(size, threading.get_native_id) != threading.get_native_id()) == elsewhere


@pytest.mark.parametrize("size", [0, LARGE])
def test_an_error_comes_back_and_is_not_printed(size: int, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        run_in_threadpool(size, lambda: 1 // 0)
    assert capfd.readouterr().err == ""
