"""The tokenizer: bytes, and a token for each word of the instructions and each coordinate."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from scripts.ui_micro.architectures.architecture import Architecture
from scripts.ui_micro.instructions import VERBS
from scripts.ui_micro.scenes import BUTTONS, COLOURS, FIELDS, ICONS

_PRETOKENS = r"click\(start_box='\(|\)'\)| ?[A-Za-z]+|\d+|\s+| ?[^\sA-Za-z\d]+"
"""Boundaries of merges: parts of an answer, words, numbers, whitespace, punctuation."""
_NOUNS = ("the", "button", "icon", "field", "empty", "filled")


def make_tokenizer(architecture: Architecture) -> Tokenizer:
    """Create the tokenizer of an architecture; it is always the same."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence([Split(Regex(_PRETOKENS), "isolated"), ByteLevel(False, use_regex=False)])
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.train_from_iterator(
        _words(architecture),
        BpeTrainer(
            vocab_size=4096,
            min_frequency=1,
            show_progress=False,
            initial_alphabet=ByteLevel.alphabet(),
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in architecture.tokens.special],
        ),
    )
    return tokenizer


def _words(architecture: Architecture) -> list[str]:
    named = (*COLOURS, *BUTTONS, *ICONS, *FIELDS, *_NOUNS)
    words = [f" {word}" for word in named] + [*VERBS, "user", architecture.tokens.assistant, "system", "\n"]
    numbers = [str(number) for number in architecture.answers.coordinates]
    return [*words, *numbers, "click(start_box='(", ",", ")')"]
