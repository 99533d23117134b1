"""Checks that MLX computes: generates a few tokens twice and compares them.

`run_self_check` starts this module as a child process, because a broken installation may abort the process or never
return. The child prints one JSON object per finished step, so that the device is known even if generation fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from scripts.diagnosis.report import Section, size
from shared.blas import prefer_openblas
from shared.settings import ROOT

_PROMPT: Final = (1, 2, 3, 4, 5, 6, 7, 8)
"""Token ids that every vocabulary has. The answer need not make sense, only be the same twice."""
_TOKENS: Final = 8
_RANDOM: Final = "random"
_TINY: Final[dict[str, Any]] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 256,
}


def run_self_check(model: Path | None, *, generate: bool, timeout_s: float) -> Section:
    """Report MLX's device and, if `generate`, whether a model gives the same tokens twice.

    Args:
        model: the folder of a text model; None for a tiny model with random weights.
    """
    section = Section("MLX")
    target = [str(model or _RANDOM)] if generate else []
    command = [sys.executable, "-P", "-m", "scripts.diagnosis.self_check", *target]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)
        output, ending = child.stdout, f"ended with status {child.returncode}: {_last_line(child.stderr)}"
    except subprocess.TimeoutExpired as expired:
        printed = expired.stdout or b""
        output = printed.decode() if isinstance(printed, bytes) else printed
        ending = f"did not finish within {timeout_s:.0f} s; --timeout allows more"
    _add_results(section, output)
    if ("self-check" not in section.facts and generate) or "device" not in section.facts:
        section.facts["self-check"] = "failed"
        section.problems.append(f"the self-check {ending}")
    section.facts.setdefault("self-check", "skipped")
    return section


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def _add_results(section: Section, output: str) -> None:
    for line in output.splitlines():
        if line.startswith("{"):
            result = json.loads(line)
            section.facts |= result["facts"]
            section.problems += result["problems"]


def _print(facts: dict[str, str], problems: list[str]) -> None:
    print(json.dumps({"facts": facts, "problems": problems}), flush=True)


def _report_device() -> None:
    blas = prefer_openblas()
    import mlx.core as mx

    backend = "Metal" if mx.metal.is_available() else "CUDA" if mx.cuda.is_available() else "CPU"
    info = mx.device_info()
    facts = {"device": f"{backend}: {info.get('device_name', 'unknown')} ({info.get('architecture', 'unknown')})"}
    if "max_recommended_working_set_size" in info:
        facts["GPU memory"] = size(int(info["max_recommended_working_set_size"]))
    facts["BLAS"] = " ".join(filter(None, (blas.name, blas.version)))
    problems = []
    if backend == "CPU" and sys.platform == "darwin":
        problems.append(
            "MLX does not see Metal: use an arm64 Python on a Mac with Apple silicon, outside of containers"
        )
    if backend == "CPU" and blas.name == "reference":
        problems.append(f"generation is slow without OpenBLAS: {blas.reason}")
    _print(facts, problems)


def _report_generation(target: str) -> None:
    model = _random_model() if target == _RANDOM else _load(Path(target))
    started = time.perf_counter()
    first = _generate(model)
    second = _generate(model)
    rate = 2 * _TOKENS / (time.perf_counter() - started)
    name = "a tiny model with random weights" if target == _RANDOM else Path(target).name
    same = first == second
    facts = {"self-check": f"{'passed' if same else 'failed'} with {name}, {rate:.0f} tokens/s", "tokens": str(first)}
    problem = f"{name} gave {first} and then {second}: the GPU or MLX computes wrongly; try other versions of MLX"
    _print(facts, [] if same else [problem])


def _random_model() -> Any:
    import mlx.core as mx
    from mlx_lm.models import llama

    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs(**_TINY))
    mx.eval(model.parameters())
    return model


def _load(folder: Path) -> Any:
    from worker.models.load import load_model

    return load_model(folder).model


def _generate(model: Any) -> list[int]:
    """Generate greedily.

    Raises:
        FloatingPointError: a probability is not a number.
    """
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    tokens = []
    for token, logprobs in generate_step(mx.array(_PROMPT), model, max_tokens=_TOKENS):
        if mx.any(mx.isnan(logprobs)).item():
            raise FloatingPointError("the model computes NaN: the weights or MLX are damaged")
        tokens.append(int(token))
    return tokens


if __name__ == "__main__":
    _report_device()
    if len(sys.argv) > 1:
        _report_generation(sys.argv[1])
    os._exit(0)  # a process that has imported MLX may abort while the interpreter ends
