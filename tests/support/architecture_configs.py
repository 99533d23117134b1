"""Configurations of tiny models: one for most architectures of mlx-lm, and what the others need beside it."""

from __future__ import annotations

from typing import Any

VOCABULARY = 256
WINDOW = 16
"""Tokens of a sliding window."""

_SLIDING, _FULL = "sliding_attention", "full_attention"
_PAIRS = [_SLIDING, _FULL] * 2
_ROPES = {kind: {"rope_theta": 10000.0, "rope_type": "default"} for kind in (_SLIDING, _FULL)}
_YARN = {
    "type": "yarn",
    "rope_type": "yarn",
    "factor": 2,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 256,
    "llama_4_scaling_beta": 0.1,
    "rope_theta": 10000.0,
}

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "sliding_window": WINDOW,
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps"), 1e-5),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group", "moe_layer_freq"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 64),
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    **dict.fromkeys(("n_embd", "d_model", "model_dim"), 64),
    **dict.fromkeys(("n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("block_size", "model_max_length"), 512),
    **dict.fromkeys(("n_positions", "n_ctx"), 4096),  # GPT-2 has an embedding of positions
    "n_inner": 96,
    "n_kv_heads": 2,
    "full_attention_interval": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    **{f"{each}_{kind}": 1.0 for each, kind in (("logits", "scaling"), ("attention", "multiplier"))},
    **{f"{each}_multiplier": 1.0 for each in ("embedding", "residual")},
    "use_qk_norm": True,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
}

_MAMBA2 = {
    "mamba_num_heads": 4,
    "mamba_n_heads": 4,
    "mamba_head_dim": 16,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "n_groups": 1,
    "use_conv_bias": True,
    "time_step_limit": [0.0, 1e9],
}
_LFM2 = {
    "conv_bias": True,
    "conv_L_cache": 3,
    "block_dim": 64,
    "block_ff_dim": 96,
    "block_multiple_of": 4,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "full_attn_idxs": [1, 3],
    "layer_types": ["conv", _FULL] * 2,
    "use_expert_bias": True,
    "num_dense_layers": 1,
}
_LONGCAT = {
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "zero_expert_num": 2,
    "ffn_hidden_size": 64,
    "expert_ffn_hidden_size": 64,
    "num_layers": 2,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "emb_neighbor_num": 3,
    "emb_split_num": 2,
    "ngram_vocab_size_ratio": 4,
}
_GEMMA = {"sliding_window_pattern": 2, "query_pre_attn_scalar": 16}
_GEMMA4 = {
    "global_head_dim": 16,
    "sliding_window_pattern": 2,
    "layer_types": _PAIRS,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {
        _FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1e6},
        _SLIDING: {"rope_theta": 10000.0},
    },
}
_GROUPS = {"layer_group_size": 2, "group_norm_size": 1}
_KDA = {
    "num_heads": 4,
    "head_dim": 16,
    "short_conv_kernel_size": 4,
    "kda_layers": [1, 3],
    "full_attn_layers": [2, 4],
    "gate_lower_bound": -5.0,
}
_LLAMA4 = {
    "attention_chunk_size": 8,
    "interleave_moe_layer_step": 2,
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 96,
    "rope_scaling": None,
    "no_rope_layers": [1, 1, 1, 0],
}
_LONG_ROPE = {
    "type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [1.0] * 4,
    "original_max_position_embeddings": 512,
}
_MINICPM = {"dim_model_base": 64, "scale_depth": 1.4, "scale_emb": 1.0}

OWN: dict[str, dict[str, Any]] = {
    "afm7": {"hidden_dim": 64, "num_kv_reuse_layers": 2, "num_kv_heads": 2},
    "afmoe": {"layer_types": _PAIRS},
    "apertus": {"post_norm": True, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2},
    "bailing_hybrid": _GROUPS,
    "bailing_moe_linear": _GROUPS,
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": _YARN},
    "deepseek_v41": {
        "num_hidden_layers": 4,
        "o_groups": 2,
        "o_lora_rank": 16,
        "hc_mult": 2,
        "rms_norm_eps": 1e-6,
        "compress_ratios": [0, 4, 4, 4],
        "kv_source_layer_ids": [0, 1, 2, 3],
        "index_source_layer_ids": [0, 1, 2, 3],
    },
    "exaone4": {"rope_scaling": None, "sliding_window_pattern": "LGLG", "layer_types": _PAIRS},
    "exaone_moe": {"layer_types": _PAIRS, "is_moe_layer": [False, True, True, True]},
    "falcon_h1": _MAMBA2 | {"mamba_d_ssm": 64, "mamba_expand": 1},
    "gemma3": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma3n": {
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCABULARY,
        "rope_local_base_freq": 10000.0,
        "final_logit_softcapping": 30.0,
        "layer_types": _PAIRS,
        "activation_sparsity_pattern": [0.5] * 4,
        "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 2,
        "altup_coef_clip": 1.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
    },
    "gemma4": _GEMMA4,
    "gemma4_text": _GEMMA4,
    "glm4_moe": {"rope_scaling": None},
    "glm_moe_dsa": {"rope_parameters": {"rope_theta": 10000.0}},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25},
    "gpt_oss": {"layer_types": _PAIRS},
    "gptj": {"rotary_dim": 8},
    # Some of their weights are always quantised in groups of 64.
    **{name: {"intermediate_size": 128} for name in ("granite", "granitemoe")},
    "granitemoehybrid": _MAMBA2 | {"mamba_expand": 1, "layer_types": ["mamba", "attention"] * 2},
    "hunyuan": {
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_cla": False,
        "cla_share_factor": 2,
        "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
    },
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 16,
        "mamba_expand": 2,
        "mamba_dt_rank": 8,
    },
    "kimi_k3": {"linear_attn_config": _KDA, "num_key_value_heads": 4, "num_experts_per_token": 2},
    "kimi_linear": {"linear_attn_config": _KDA, "num_key_value_heads": 4, "num_experts_per_token": 2},
    "lfm2": _LFM2,
    "lfm2-vl": _LFM2,
    "lfm2_moe": _LFM2,
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4 | {"no_rope_layers": [1, 0] * 2},
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": _LONGCAT,
    "mamba": {"state_size": 16, "conv_kernel": 4, "use_conv_bias": True, "time_step_rank": 8, "expand": 2},
    "mamba2": _MAMBA2 | {"state_size": 16, "time_step_rank": "auto", "expand": 1},
    "mellum": {"layer_types": _PAIRS, "rope_parameters": _ROPES},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0, 1],
        "moe_layer_freq": [0, 1, 0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": WINDOW,
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "minicpm": _MINICPM,
    "minicpm3": _MINICPM | {"rope_scaling": _LONG_ROPE},
    "minimax": {"rotary_dim": 16, "attn_type_list": [0, 1, 0, 1]},
    "minimax_m3_vl": {
        "moe_layer_freq": [0, 1, 1, 1],
        "dense_intermediate_size": 96,
        "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral3": {"layer_types": _PAIRS, "rope_parameters": _YARN},
    "mistral3": {"layer_types": _PAIRS, "rope_parameters": _YARN},
    "mistral4": {"rope_parameters": _YARN},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {
                "attention": {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False},
                "ffn": {"ffn_mult": 1.3, "no_op": False, "replace_with_linear": False},
            }
        ]
        * 4
    },
    "nemotron_h": _MAMBA2 | {"residual_in_fp32": True, "hybrid_override_pattern": ["M", "*", "M", "-"]},
    "olmo3": {"layer_types": _PAIRS},
    "olmo_hybrid": {"linear_allow_neg_eigval": True, "layer_types": ["linear_attention", _FULL] * 2},
    "openelm": {
        "num_transformer_layers": 4,
        "ffn_dim_divisor": 8,
        "ffn_multipliers": [1.0] * 4,
        "normalize_qk_projections": True,
        "num_kv_heads": [2] * 4,
        "num_query_heads": [4] * 4,
    },
    "phi3small": {
        "vocab_size": 100_352,  # its output layer has constant token ids up to here
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 96,
        "gegelu_limit": 20.0,
    },
    "phixtral": {"num_vocab": VOCABULARY, "rotary_dim": 8},
    "plamo": {"n_shared_head": 2},
    "plamo2": _MAMBA2 | {"hidden_size_per_head": 16, "attention_window_size": WINDOW, "full_attention_idx": [1]},
    "plamo3": {"window_size": WINDOW},
    "qwen": {"kv_channels": 16, "intermediate_size": 192},
    "recurrent_gemma": {
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": WINDOW,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv7": {f"{each}_low_rank_dim": 8 for each in ("a", "v", "gate", "decay")},
    "spark2_5": {"rope_parameters": _ROPES, "layer_types": _PAIRS},
    "stablelm": {"use_qkv_bias": False},
    "step3p5": {
        "num_attention_groups": 2,
        "layer_types": _PAIRS,
        "partial_rotary_factors": [0.5, 1.0] * 2,
        "attention_other_setting": {"num_attention_heads": 4, "num_attention_groups": 2},
        "use_head_wise_attn_gate": True,
        "share_expert_dim": 64,
        "moe_layers_enum": "1,2,3",
    },
}
"""What an architecture needs beside or instead of `COMMON`."""


def config(name: str) -> dict[str, Any]:
    """`config.json` of a tiny model."""
    own = COMMON | OWN.get(name, {}) | {"model_type": name}
    if name == "minicpm3":  # transformers refuses it
        del own["logits_scaling"]
    return own | {"text_config": dict(own) | {"model_type": _TEXT.get(name, name)}}


_TEXT = {
    "mistral3": "ministral3",
    "lfm2-vl": "lfm2",
    "gemma4": "gemma4_text",
    "pixtral": "llama",
    "kimi_k25": "deepseek_v3",
    "kimi_vl": "deepseek_v3",
}
"""Model types of the language halves."""
