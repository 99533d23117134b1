"""Tiny random embedding models and rerankers, with the files and the names of weights that hubs have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from scripts.model_files.weights import save_weights

TEXTS: Final = (
    "A short text.",
    "The quick brown fox jumps over the lazy dog, and then it sleeps.",
    "hello",
    "Rivers, stones, lights and morning papers. " * 6,
    "What is the capital of France?",
    "Numbers such as 12 and 345 are tokens as well. " * 3,
)
SPECIAL: Final = {
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "modernbert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "xlm-roberta": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
    "qwen3": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"),
}
HIDDEN, HEADS, INNER, LAYERS, POSITIONS = 32, 4, 64, 3, 130

Weights = dict[str, mx.array]


def make_embedding_model(folder: Path, model_type: str, *, rerank: bool = False, pooling: str | None = None) -> Path:
    """Write a model to a folder and return the folder.

    Args:
        rerank: whether it is a cross-encoder; not for `qwen3`, whose rerankers differ only in their name.
        pooling: as in `1_Pooling/config.json`; None for no files of sentence-transformers.
    """
    folder.mkdir(parents=True)
    tokenizer = make_tokenizer(model_type)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = _config(model_type, tokenizer.get_vocab_size(), rerank=rerank)
    _write(folder / "config.json", config)
    special = SPECIAL[model_type]
    _write(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": special[1 if model_type == "xlm-roberta" else 0]},
    )
    save_weights(folder / "model.safetensors", _random(_shapes(model_type, config, rerank=rerank)))
    if pooling is not None:
        _write_modules(folder, pooling)
    return folder


def make_tokenizer(model_type: str) -> Tokenizer:
    """Return a tokenizer with the special tokens of a type of model, trained on `TEXTS`."""
    special = list(SPECIAL[model_type])
    if model_type == "qwen3":
        return _byte_tokenizer(special)
    unknown = "<unk>" if model_type == "xlm-roberta" else "[UNK]"
    tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    begin, end, joint = ("<s>", "</s>", "</s> </s>") if model_type == "xlm-roberta" else ("[CLS]", "[SEP]", "[SEP]")
    second = 1 if model_type == "bert" else 0
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {joint} $B:{second} {end}:{second}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (begin, end)],
    )
    return tokenizer


def _byte_tokenizer(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([*TEXTS, "yes no " * 50], trainer)
    tokenizer.add_tokens([word for word in ("yes", "no") if tokenizer.token_to_id(word) is None])
    end = special[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
    )
    return tokenizer


def _config(model_type: str, vocabulary: int, *, rerank: bool) -> dict[str, Any]:
    common = {
        "model_type": model_type,
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": POSITIONS,
    }
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}} if rerank else {}
    suffix = "ForSequenceClassification" if rerank else "Model"
    match model_type:
        case "bert":
            own = {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "pad_token_id": 0}
            return {**common, **own, **labels, "architectures": [f"Bert{suffix}"]}
        case "xlm-roberta":
            own = {"type_vocab_size": 1, "layer_norm_eps": 1e-5, "hidden_act": "gelu", "pad_token_id": 1}
            return {**common, **own, **labels, "architectures": [f"XLMRoberta{suffix}"]}
        case "modernbert":
            own = {"local_attention": 8, "global_attn_every_n_layers": 3, "norm_eps": 1e-5, "pad_token_id": 0}
            own |= {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "classifier_pooling": "mean"}
            return {**common, **own, **labels, "architectures": [f"ModernBert{suffix}"]}
    own = {"num_key_value_heads": 2, "head_dim": HIDDEN // HEADS, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    common["max_position_embeddings"] = 512  # rotary: no weights depend on it
    return {**common, **own, "tie_word_embeddings": True, "architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu"}


def _shapes(model_type: str, config: Mapping[str, Any], *, rerank: bool) -> dict[str, tuple[int, ...]]:
    if model_type == "modernbert":
        return _modernbert_shapes(config, rerank=rerank)
    return _qwen3_shapes(config) if model_type == "qwen3" else _bert_shapes(config, rerank=rerank)


def _bert_shapes(config: Mapping[str, Any], *, rerank: bool) -> dict[str, tuple[int, ...]]:
    roberta = config["model_type"] == "xlm-roberta"
    prefix = ("roberta." if roberta else "bert.") if rerank else ""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], HIDDEN),
        "embeddings.position_embeddings.weight": (POSITIONS, HIDDEN),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], HIDDEN),
        **_norm("embeddings.LayerNorm"),
        **({} if roberta and rerank else _linear("pooler.dense", HIDDEN, HIDDEN)),
    }
    for index in range(LAYERS):
        layer = f"encoder.layer.{index}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= _linear(f"{layer}.attention.{name}", HIDDEN, HIDDEN)
        shapes |= _norm(f"{layer}.attention.output.LayerNorm") | _norm(f"{layer}.output.LayerNorm")
        shapes |= _linear(f"{layer}.intermediate.dense", HIDDEN, INNER) | _linear(
            f"{layer}.output.dense", INNER, HIDDEN
        )
    head: dict[str, tuple[int, ...]] = {}
    if rerank and roberta:
        head = _linear("classifier.dense", HIDDEN, HIDDEN) | _linear("classifier.out_proj", HIDDEN, 1)
    elif rerank:
        head = _linear("classifier", HIDDEN, 1)
    return {prefix + name: shape for name, shape in shapes.items()} | head


def _modernbert_shapes(config: Mapping[str, Any], *, rerank: bool) -> dict[str, tuple[int, ...]]:
    prefix = "model." if rerank else ""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.tok_embeddings.weight": (config["vocab_size"], HIDDEN),
        "embeddings.norm.weight": (HIDDEN,),
        "final_norm.weight": (HIDDEN,),
    }
    for index in range(LAYERS):
        shapes |= {
            f"layers.{index}.attn.Wqkv.weight": (3 * HIDDEN, HIDDEN),
            f"layers.{index}.attn.Wo.weight": (HIDDEN, HIDDEN),
            f"layers.{index}.mlp.Wi.weight": (2 * INNER, HIDDEN),
            f"layers.{index}.mlp.Wo.weight": (HIDDEN, INNER),
            f"layers.{index}.mlp_norm.weight": (HIDDEN,),
        }
        if index:
            shapes[f"layers.{index}.attn_norm.weight"] = (HIDDEN,)
    head: dict[str, tuple[int, ...]] = {"head.dense.weight": (HIDDEN, HIDDEN), "head.norm.weight": (HIDDEN,)}
    return {prefix + name: shape for name, shape in shapes.items()} | (
        head | _linear("classifier", HIDDEN, 1) if rerank else {}
    )


def _qwen3_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes with the names of the embedding models on the hub, which lack the prefix `model.`."""
    size, keys = HIDDEN // HEADS, config["num_key_value_heads"] * HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config["vocab_size"], HIDDEN),
        "norm.weight": (HIDDEN,),
    }
    for index in range(LAYERS):
        layer = f"layers.{index}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": (keys, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": (keys, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.self_attn.q_norm.weight": (size,),
            f"{layer}.self_attn.k_norm.weight": (size,),
            f"{layer}.mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{layer}.mlp.up_proj.weight": (INNER, HIDDEN),
            f"{layer}.mlp.down_proj.weight": (HIDDEN, INNER),
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
        }
    return shapes


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (HIDDEN,), f"{name}.bias": (HIDDEN,)}


def _random(shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """Return weights with which the tokens of a text differ: norms near 1, and matrices that keep the variance."""

    def weight(index: int, name: str, shape: tuple[int, ...]) -> mx.array:
        values = mx.random.normal(shape, key=mx.random.key(index))
        if len(shape) == 1:
            return values * 0.1 + (1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0)
        return values if "embed" in name else values * shape[-1] ** -0.5

    return {name: weight(index, name, shape) for index, (name, shape) in enumerate(shapes.items())}


def _write_modules(folder: Path, pooling: str) -> None:
    types = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    _write(
        folder / "modules.json",
        [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in types],
    )
    (folder / "1_Pooling").mkdir()
    names = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    _write(folder / "1_Pooling/config.json", {f"pooling_mode_{name}": name == pooling for name in names})


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
