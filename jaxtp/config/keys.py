"""Settings of a `config.json` that say nothing of the forward pass, and those that may stand there with one value only.

transformers takes any key without a word and looks at few. Here a key that is in no table is refused, unless it is null or
begins with an underscore: whoever meets one can tell whether it matters.
"""

from __future__ import annotations

from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}  # of the gate, and ours
# Settings that are the same number in both spellings, where a family has the key
NUMBERS = {
    "attention_scale": "attention_multiplier",
    "attention_softcap": "attn_logit_softcapping",
    "logits_softcap": "final_logit_softcapping",
    "embedding_multiplier": "embedding_multiplier",
    "residual_multiplier": "residual_multiplier",
    "logits_scaling": "logits_scaling",
}
DTYPE_NAMES = {**{name: name for name in DTYPES}, "float": "float32", "half": "float16"}  # torch's other names

HARMLESS = frozenset(
    # what wrote the file, and for what
    (
        "architectures model_type transformers_version transformers.js_config name_or_path auto_map tokenizer_class "
        "is_llama_config is_decoder is_encoder_decoder problem_type id2label label2id num_labels finetuning_task "
        "task_specific_params prefix unsloth_fixed unsloth_version unsloth_tiled_mlp "
        # how tensors are kept, cut or computed
        "dtype torch_dtype torchscript use_bfloat16 tf_legacy_loss pruned_heads pretraining_tp use_cache attn_implementation "
        "use_flash_attention use_flash_attention_2 use_flash_attn flash_attention chunk_size_feed_forward cache_implementation "
        "output_attentions output_hidden_states return_dict "
        # of training: initialisation and dropout
        "initializer_range attention_dropout attn_dropout attn_pdrop embd_pdrop resid_pdrop hidden_dropout "
        "hidden_dropout_prob embedding_dropout classifier_dropout gradient_checkpointing use_gradient_checkpointing "
        "neftune_noise_alpha "
        # special tokens; these two are read elsewhere
        "bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id "
        "decoder_start_token_id "
        # lengths that other programs go by
        "max_sequence_length model_max_length max_seq_len max_seq_length seq_length tokenizer_model_max_length "
        # biases: where a family has no switch for them, its weights tell
        "attention_bias mlp_bias "
        # of layers' windows, where a family has none or the same in every layer
        "max_window_layers "
        # of experts: what a forward pass gives back
        "output_router_logits "
        # defaults of generation, which old configs carry whole
        "max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups "
        "diversity_penalty temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty "
        "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores "
        "return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values "
        "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens"
    ).split()
)
FIXED: dict[str, tuple[Any, ...]] = {
    "rotary_pct": (1, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "use_qk_norm": (False, None),
    "use_bidirectional_attention": (False, None),
    "logit_scale": (1, None),
    "router_jitter_noise": (0, None),
    "clip_qkv": (None,),
    "attn_logit_softcapping": (None,),
    "lm_head_bias": (False, None),
    "full_attn_mod": (1, None),
    "interpolate_factor": (1, None),
}
# Of `rope_scaling`, beside what `rope.KINDS` names: who trained with it.
ROPE_HARMLESS = ("finetuned",)
