"""`scripts/bench_gpu`: Measures what a GPU does with models of 7B parameters, in at most 8 minutes.

Makes a Qwen2.5-7B and a hybrid of that size with random weights, and measures both in bfloat16 and in 4 bits: decode
tokens/s at 1, 8, 32 and 64 rows beside the limit of the memory bandwidth, prefill tokens/s, the time to the first token
of 4,000 tokens, and whether rows have the tokens that they have alone. The rest of the time goes to the whole stack
beside mlx_lm.server. Results are written after each measurement, so a run that is cut off keeps what it has.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from shared.blas import prefer_openblas
from shared.settings import ROOT

MINUTES: Final = 8.0
ROWS: Final = (1, 8, 32, 64)
PROMPT: Final = 4000
TOKENS: Final = 64
BITS: Final = (16, 4)
SHAPES: Final = ("qwen2.5-7b", "7b-hybrid")
TINY_SHAPES: Final = ("tiny", "tiny-hybrid")
GOAL: Final = 372.0
"""Tokens/s to exceed: with 4 bits at one row, and with bfloat16 from two rows on."""
_MARGIN_S: Final = 20.0
_STOP_S: Final = 60.0
"""Time limit for a command to stop a server."""


class Run:
    """Measures until the time is used up.

    Args:
        output: file for the results.
        end: time by `time.monotonic` at which everything must have ended.
    """

    def __init__(self, output: Path, end: float) -> None:
        self.results: dict[str, Any] = {}
        self._output = output
        self._end = end

    def step(self, name: str, command: Sequence[str], *, parse: bool = True) -> bool:
        """Run a command and keep its last line, which is JSON. Returns whether it succeeded in time."""
        left = self._end - time.monotonic()
        if left < _MARGIN_S:
            self.results[name] = {"skipped": "no time left"}
            return False
        print(f"{name} ({left:.0f} s left)", file=sys.stderr, flush=True)
        start = time.monotonic()
        try:
            lines = _run(command, left).splitlines()
            found = json.loads(lines[-1]) if parse else {}
        except subprocess.TimeoutExpired:
            found = {"failed": "out of time"}
        except (subprocess.CalledProcessError, ValueError, IndexError) as error:
            text = getattr(error, "stderr", "") or str(error)
            found = {"failed": text.strip()[-500:]}
        self.results[name] = found | {"seconds": round(time.monotonic() - start, 1)}
        self._output.write_text(json.dumps(self.results, indent=2) + "\n")
        return "failed" not in found


def _run(command: Sequence[str], timeout_s: float) -> str:
    """Run a command and return its output. At its time limit it gets SIGTERM, so that it stops what it has started.

    Raises:
        subprocess.CalledProcessError, subprocess.TimeoutExpired: as from `subprocess.run`.
    """
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as child:
        try:
            output, errors = child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.communicate(timeout=_STOP_S)
            raise
        finally:
            child.kill()
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command, output, errors)
    return str(output)


def measure(run: Run, shapes: Sequence[str], folder: Path) -> None:
    """Make the models and measure them."""
    python = (sys.executable, "-P", "-m")
    run.step("memory bandwidth", [*python, "tests.bench.bandwidth"])
    for shape in shapes:
        model = folder / shape
        if not run.step(
            f"make {shape}",
            [*python, "scripts.model_files.make_tiny_model", "--shape", shape, "-o", str(model)],
            parse=False,
        ):
            continue
        for bits in BITS:
            run.step(f"{shape}, {bits} bits", [*python, "tests.bench.gpu", "--one", str(model), "--bits", str(bits)])
    for shape in shapes:
        report = folder / f"{shape}.json"
        load = [*python, "tests.bench.cli", "--only", "load", "--scenario", "single", "closed", "--rounds", "1"]
        who = ["--who", "mlxq", "mlx_lm.server", "--clients", "1", "32", "--tokens", str(TOKENS)]
        if run.step(
            f"stack, {shape}", [*load, *who, "--model", str(folder / shape), "--json", str(report)], parse=False
        ):
            run.results[f"stack, {shape}"]["report"] = json.loads(report.read_text())


def measure_one(model: Path, bits: int) -> dict[str, Any]:
    """Measure a model in this process."""
    import mlx.core as mx

    from tests.bench.bandwidth import bytes_per_token
    from tests.support.runner import alone, numbered
    from tests.support.runner import run as run_rows
    from worker.models.load import convert, load_model
    from worker.runner.memory import Memory
    from worker.runner.model_runner import MLXRunner, default_chunk

    start = time.perf_counter()
    loaded = load_model(model, lazy=True)
    convert(loaded, None, None if bits == 16 else bits)
    mx.eval(loaded.model.parameters())
    runner = MLXRunner(loaded, default_chunk(), Memory(2**35, 0))
    runner.warm()
    found: dict[str, Any] = {"load_s": time.perf_counter() - start, "weights_bytes": runner.weights_bytes}
    found["bytes_per_token"] = bytes_per_token(model) if bits == 16 else runner.weights_bytes
    found["ttft_s"] = _first_token(runner)
    found["prefill_tokens_per_s"] = PROMPT / found["ttft_s"]
    found["decode_tokens_per_s"] = {rows: _decode_speed(runner, rows) for rows in ROWS}
    rows = [numbered(uid, 16 + 5 * uid, 16) for uid in range(4)]
    expected = {each.uid: alone(runner, each) for each in rows}
    together = run_rows(runner, rows)
    found["equal_tokens"] = sum(
        one == other for uid in expected for one, other in zip(expected[uid], together[uid], strict=True)
    )
    found["compared_tokens"] = sum(map(len, expected.values()))
    return found


def _first_token(runner: Any) -> float:
    """Return the seconds of the prefill of a long prompt, up to its first token; the better one of two."""
    from tests.support.runner import alone, numbered

    rows = [numbered(uid, PROMPT, 1) for uid in (1, 2)]
    return min(_timed(partial(alone, runner, each)) for each in rows)


def _decode_speed(runner: Any, count: int) -> float:
    """Return tokens/s of rows that decode together."""
    from tests.support.runner import numbered, step

    runner.insert([numbered(uid, 32, 3 * TOKENS) for uid in range(count)])
    while runner.prefillable():
        step(runner)
    for _ in range(4):
        step(runner)
    steps = TOKENS
    seconds = _timed(lambda: [step(runner) for _ in range(steps)])
    runner.remove(range(count))
    return count * steps / seconds


def _timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def lines(results: dict[str, Any], shapes: Sequence[str]) -> Iterator[str]:
    """Yield the figures as text."""
    speed = max((each for each in results.get("memory bandwidth", {}).values()), default=0.0)
    for shape in shapes:
        for bits in BITS:
            found = results.get(f"{shape}, {bits} bits", {})
            if "decode_tokens_per_s" not in found:
                yield f"{shape}, {bits} bits: {found.get('failed') or found.get('skipped') or 'not measured'}"
                continue
            limit = speed / found["bytes_per_token"]
            decode = ", ".join(f"{rows} rows {each:.0f}" for rows, each in found["decode_tokens_per_s"].items())
            yield (
                f"{shape}, {bits} bits: decode tokens/s: {decode} (bandwidth allows {limit:.0f} at one row; to exceed: "
                f"{GOAL:.0f}); prefill {found['prefill_tokens_per_s']:.0f} tokens/s; TTFT of {PROMPT} tokens "
                f"{found['ttft_s']:.2f} s; {found['equal_tokens']} of {found['compared_tokens']} tokens as alone"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench_gpu", description=(__doc__ or "").split(": ", 1)[1].split("\n\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="maximum duration (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=Path("bench-gpu.json"), help="file for the results")
    parser.add_argument(
        "--tiny", action="store_true", help="use tiny models, on any device: checks that the command works"
    )
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bits", type=int, default=16, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    prefer_openblas()
    if arguments.one:
        print(json.dumps(measure_one(arguments.one, arguments.bits)))
        return 0
    if not arguments.tiny and not _has_gpu():
        print("bench_gpu: there is no GPU that MLX can use; install mlx[cuda13] on Linux", file=sys.stderr)
        return 2
    shapes = TINY_SHAPES if arguments.tiny else SHAPES
    run = Run(arguments.output.resolve(), time.monotonic() + 60 * arguments.minutes)
    with tempfile.TemporaryDirectory(prefix="mlxq-bench-gpu-") as folder, contextlib.suppress(KeyboardInterrupt):
        measure(run, shapes, Path(folder))
    for line in lines(run.results, shapes):
        print(line)
    return int(any("failed" in each for each in run.results.values()))


def _has_gpu() -> bool:
    code = "import mlx.core as mx; print(mx.default_device() == mx.gpu)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return ended.stdout.strip() == "True"


if __name__ == "__main__":
    sys.exit(main())
