"""Checks of what an architecture reuses: prefixes in memory and on disk, and verified draft tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from shared.settings import Settings
from tests.architectures.batches import RESTRICTED, runner_of
from tests.architectures.folders import Unsupported, write_folder
from tests.architectures.kinds import Kind, kind_of
from tests.support.architecture_configs import VOCABULARY, config
from tests.support.architectures import make
from tests.support.runner import alone, loaded, row, run, step
from worker.runner.base import ModelRunner
from worker.runner.batching.support import UNRESTRICTED, Together
from worker.runner.decode_row import DecodeRow
from worker.runner.model_runner import MLXRunner
from worker.runner.speculation.proposer import Proposer

PROMPT, SHARED, BLOCK = 210, 150, 64
"""Tokens of a prompt, of its beginning that another prompt has, too, and between two checkpoints."""
LONG, DRAFTED, PIECE = 2500, 40, 64
ANSWER = 8
TOLERANCE = 1e-2
"""Difference of two logits below which either token may be chosen."""


def check_conversation(name: str, _folder: Path) -> None:
    """A repeated prompt, and the next turn of a conversation, reuse all earlier tokens."""
    model = make(name)
    runner = runner_of(name, model, RESTRICTED.get(name, UNRESTRICTED))
    prompt = prompt_of(PROMPT)
    answer, _ = generate(runner, 1, prompt)
    again, reused = generate(runner, 2, prompt)
    longer = [*prompt, *answer, *prompt_of(20, 5)]
    following, continued = generate(runner, 3, longer)
    for tokens, before in ((answer, prompt), (again, prompt), (following, longer)):
        check_greedy(name, model, before, tokens)
    _require_prefixes(name, model)
    assert reused == PROMPT - 1
    assert continued >= PROMPT + ANSWER - 1


def check_shared_prefix(name: str, _folder: Path) -> None:
    """A prompt with the same beginning as another reuses most of it, if its cache can be cut there."""
    model = make(name)
    runner = runner_of(name, model, RESTRICTED.get(name, UNRESTRICTED))
    generate(runner, 1, prompt_of(PROMPT))
    other = [*prompt_of(PROMPT)[:SHARED], *prompt_of(PROMPT - SHARED, 5)]
    answer, reused = generate(runner, 2, other)
    check_greedy(name, model, other, answer)
    _require_prefixes(name, model)
    assert reused == SHARED if kind_of(model).can_be_cut else SHARED - BLOCK < reused <= SHARED


def check_disk(name: str, folder: Path) -> None:
    """After a restart, a worker finds at least 80 % of a long prompt on disk."""
    model = make(name)
    write_folder(folder / "model", model, config(name))
    settings = Settings(
        model_path=folder / "model", models_file=folder / "none.toml", data_dir=folder / "data", _env_file=None
    )
    prompt = prompt_of(LONG)
    first = loaded(settings)
    expected, _ = generate(first, 1, prompt)
    first.close()
    second = loaded(settings)
    answer, reused = generate(second, 1, prompt)
    second.close()
    check_greedy(name, model, prompt, answer)
    check_greedy(name, model, prompt, expected)
    _require_prefixes(name, model)
    assert reused >= 0.8 * LONG


def check_speculation(name: str, _folder: Path) -> None:
    """Rows that verify draft tokens, some of them wrong, have the text that they have without."""
    model = make(name)
    support = RESTRICTED.get(name, UNRESTRICTED)
    prompts = {1: prompt_of(40), 2: prompt_of(23, 5)}
    plain = runner_of(name, model, support)
    answers = {uid: generate(plain, uid, prompt, DRAFTED)[0] for uid, prompt in prompts.items()}
    runner = runner_of(name, model, support)
    runner._speculation._proposers = [KnownText({uid: [*prompts[uid], *answers[uid]] for uid in prompts})]
    if support.prefill is Together.ANY:
        found = run(runner, [row(uid, prompt, DRAFTED) for uid, prompt in prompts.items()])
    else:  # rows that verify different numbers of tokens cannot share a pass
        found = {uid: alone(runner, row(uid, prompt, DRAFTED)) for uid, prompt in prompts.items()}
    for uid, tokens in found.items():
        check_greedy(name, model, prompts[uid], tokens)
    stats = runner.stats()
    drafted, accepted = (stats[f"speculation_{what}_tokens_total"] for what in ("drafted", "accepted"))
    if not drafted and not (kind_of(model).can_be_cut and support.speculates and support.decode is Together.ANY):
        raise Unsupported("Drafts are not verified")
    assert 0 < accepted < drafted


def _require_prefixes(name: str, model: Any) -> None:
    if not RESTRICTED.get(name, UNRESTRICTED).continues or kind_of(model) is Kind.OTHER:
        raise Unsupported("Prefixes are not stored")


class KnownText(Proposer):
    """Proposes the tokens of known texts, with a wrong one now and then."""

    def __init__(self, texts: Mapping[int, Sequence[int]]) -> None:
        self._texts = texts

    def expected(self, rows: Sequence[DecodeRow], max_length: int) -> list[list[float]]:
        """Expect that all draft tokens are accepted."""
        return [[float(1 + i) for i in range(max_length)] for _ in rows]

    def propose(self, rows: Sequence[DecodeRow], length: int) -> list[list[int]]:
        """Propose the next tokens of each row."""
        return [self._drafts(each, length) for each in rows]

    def _drafts(self, each: DecodeRow, length: int) -> list[int]:
        text, start = self._texts[each.uid], each.length + 1
        wrong = 5 + each.uid
        return [
            (token + 1) % VOCABULARY if index % wrong == 0 else token
            for index, token in enumerate(text[start : start + length], start)
        ]

    def drop(self, uids: Collection[int]) -> None:
        """Keep the texts."""


def prompt_of(length: int, seed: int = 7) -> list[int]:
    """Return a prompt of different tokens."""
    return [(seed * i + i * i // 3) % VOCABULARY for i in range(length)]


def generate(
    runner: ModelRunner | MLXRunner, uid: int, prompt: Sequence[int], tokens: int = ANSWER
) -> tuple[list[int], int]:
    """Run a row alone, and remove it.

    Returns:
        Its tokens, and how many tokens of the prompt were reused.
    """
    runner.insert([row(uid, prompt, tokens, owner="me")])
    answer: list[int] = []
    reused = 0
    while len(answer) < tokens:
        output = step(runner)
        assert not output.failed
        answer += [each.token for each in output.tokens]
        reused += sum(output.prefilled.values())
    runner.remove([uid])
    return answer, reused


def check_greedy(name: str, model: Any, prompt: Sequence[int], answer: Sequence[int]) -> None:
    """Check that each token is the most probable one, up to rounding."""
    if not RESTRICTED.get(name, UNRESTRICTED).continues:
        return  # its logits depend on the pieces in which a text is read
    cache, text = make_prompt_cache(model), [*prompt, *answer]
    pieces = [model(mx.array([text[i : i + PIECE]]), cache=cache) for i in range(0, len(text), PIECE)]
    logits = mx.concatenate(pieces, axis=1)[0, len(prompt) - 1 : -1]
    chosen = mx.take_along_axis(logits, mx.array(list(answer))[:, None], axis=1)[:, 0]
    assert mx.all(logits.max(axis=1) - chosen < TOLERANCE).item()
