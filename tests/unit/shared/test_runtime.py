"""Long-lived objects are excluded from garbage collection."""

import subprocess
import sys

SETTLED = """
import gc
from shared.runtime import freeze_garbage_collector, pause_garbage_collector

pause_garbage_collector()
kept = [[n] for n in range(50_000)]
freeze_garbage_collector()
assert gc.isenabled(), "the collector is still paused"
assert not any(tracked is kept for tracked in gc.get_objects()), "kept objects are still tracked"
passes = []
gc.callbacks.append(lambda phase, _: passes.append(phase))
for _ in range(100):
    burst = [(n, []) for n in range(1000)]
    del burst
print(len(passes))
"""


def test_short_lived_bursts_start_no_collection() -> None:
    result = subprocess.run([sys.executable, "-c", SETTLED], check=False, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout.strip()) == (0, "0"), result.stderr
