"""What a process keeps for good is not looked through again and again."""

import subprocess
import sys

SETTLED = """
import gc
from shared.garbage import settle

kept = [[n] for n in range(50_000)]
settle()
assert not any(each is kept for each in gc.get_objects()), "it is still looked through"
passes = []
gc.callbacks.append(lambda phase, _: passes.append(phase))
for _ in range(100):
    burst = [(n, []) for n in range(1000)]
    del burst
print(len(passes))
"""


def test_a_settled_process_does_not_collect_for_bursts_that_pass() -> None:
    ended = subprocess.run([sys.executable, "-c", SETTLED], check=False, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout.strip()) == (0, "0"), ended.stderr
