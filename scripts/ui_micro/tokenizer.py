"""The tokenizer: bytes, and a token for each word of the instructions and each coordinate."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from scripts.ui_micro.instructions import GRID, VERBS
from scripts.ui_micro.scenes import BUTTONS, COLOURS, FIELDS, ICONS

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
SPECIAL = (PAD, START, END, VISION_START, VISION_END, "<|vision_pad|>", IMAGE, VIDEO)
MAX_COORDINATE = 280
"""Maximum coordinate with a token of its own."""

_PRETOKENS = r"click\(start_box='\(|\)'\)| ?[A-Za-z]+|\d+|\s+| ?[^\sA-Za-z\d]+"
"""Boundaries of merges: parts of an answer, words, numbers, whitespace, punctuation."""
_NOUNS = ("the", "button", "icon", "field", "empty", "filled")


def make_tokenizer() -> Tokenizer:
    """Create the tokenizer; it is always the same."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence([Split(Regex(_PRETOKENS), "isolated"), ByteLevel(False, use_regex=False)])
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.train_from_iterator(
        _words(),
        BpeTrainer(
            vocab_size=4096,
            min_frequency=1,
            show_progress=False,
            initial_alphabet=ByteLevel.alphabet(),
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        ),
    )
    return tokenizer


def _words() -> list[str]:
    named = (*COLOURS, *BUTTONS, *ICONS, *FIELDS, *_NOUNS)
    words = [f" {word}" for word in named] + [*VERBS, "user", "assistant", "system", "\n"]
    numbers = [str(number) for number in range(0, MAX_COORDINATE + 1, GRID)]
    return [*words, *numbers, "click(start_box='(", ",", ")')"]
