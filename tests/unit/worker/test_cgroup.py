"""OOM kills are read in both versions of control groups, and described in exits."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker.process.cgroup import read_oom_kills
from worker.process.exits import Exit

V2 = "0::/system.slice/mlxq.service\n"
V1 = "9:name=systemd:/x\n4:cpu,memory:/box\n0::/\n"
EVENTS = "low 0\nhigh 0\nmax 7\noom 2\noom_kill 2\noom_group_kill 0\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"


@pytest.mark.parametrize(
    ("memberships", "file", "content", "expected"),
    [
        (V2, "system.slice/mlxq.service/memory.events", EVENTS, 2),
        (V2, "memory.events", EVENTS, 2),  # a container sees its own cgroup as the root
        (V1, "memory/box/memory.oom_control", CONTROL, 5),
        (V1, "memory/memory.oom_control", CONTROL, 5),
        (V1, "memory/box/memory.oom_control", "under_oom 0\n", None),
        (V2, "elsewhere/memory.events", EVENTS, None),
        ("", "memory.events", EVENTS, None),
        (None, "memory.events", EVENTS, None),
    ],
)
def test_oom_kills_are_read_in_every_layout(
    tmp_path: Path, memberships: str | None, file: str, content: str, expected: int | None
) -> None:
    if memberships is not None:
        (tmp_path / "cgroup").write_text(memberships)
    path = tmp_path / "mount" / file
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert read_oom_kills(tmp_path / "cgroup", tmp_path / "mount") == expected


@pytest.mark.parametrize(
    ("ended", "words", "abnormal"),
    [
        (Exit(0), "status 0", False),
        (Exit(78), "status 78", False),
        (Exit(70), "status 70 (it found itself broken)", True),
        (Exit(1), "status 1", True),
        (Exit(-9, oom_kills=0), "signal 9 (SIGKILL)", True),
        (Exit(-9, oom_kills=1), "signal 9 (SIGKILL), after an OOM kill in its control group", True),
        (Exit(-63), "signal 63", True),
    ],
)
def test_an_exit_is_described(ended: Exit, words: str, abnormal: bool) -> None:
    assert (ended.describe(), ended.abnormal) == (words, abnormal)
