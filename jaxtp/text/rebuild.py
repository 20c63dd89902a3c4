"""Tokenizers that transformers 5 makes anew of a tokenizer.json's vocabulary and merges, by the class that a folder declares.

`tokenizer_class` counts for more there than the file's own normalizer, pre-tokenizer and decoder; the ids of texts with digits
or leading spaces depend on it. Source: `transformers.models.*.tokenization_*`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Spec = dict[str, Any]  # the content of a tokenizer.json
_QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Rebuilt:
    """A class: what its `parts` of a tokenizer.json are by the settings, and the special tokens that it has unasked."""

    parts: Callable[[Mapping[str, Any]], Spec]
    named: Mapping[str, str]
    model: Mapping[str, Any] = field(default_factory=dict)
    marks_special: bool = False
    """Whether it adds its special tokens once more, as such."""
    keeps_post_processor: bool = True

    def rebuild(self, spec: Spec, settings: Mapping[str, Any]) -> Spec:
        """The content of a tokenizer.json of this class, without added tokens."""
        old = spec["model"]
        vocab = old["vocab"]
        model = {"type": "BPE", "vocab": vocab, "merges": old.get("merges") or [], **self.model}
        if "unk_token" in model:
            model["unk_token"] = str(settings.get("unk_token") or self.named["unk_token"])
        found = {"version": "1.0", "added_tokens": [], "normalizer": None, "model": model, **self.parts(settings)}
        return found | ({"post_processor": spec.get("post_processor")} if self.keeps_post_processor else {})


def _replace(old: str, new: str) -> Spec:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _metaspace(scheme: str, *, strips: bool) -> Spec:
    steps = [_replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if strips else []
    return {
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": steps + strip},
    }


def _llama(settings: Mapping[str, Any]) -> Spec:
    prefix = settings.get("add_prefix_space") in (None, True)
    scheme = "never" if not prefix else "always" if settings.get("legacy") else "first"
    return _metaspace(scheme, strips=prefix)


def _code_llama(settings: Mapping[str, Any]) -> Spec:
    return _metaspace("first" if settings.get("add_prefix_space") in (None, True) else "never", strips=True)


def _gemma(settings: Mapping[str, Any]) -> Spec:
    return {
        "normalizer": _replace(" ", "▁"),
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
        "decoder": {"type": "Sequence", "decoders": [_replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}]},
    }


def _byte_level(settings: Mapping[str, Any]) -> Spec:
    level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "pre_tokenizer": {**level, "add_prefix_space": bool(settings.get("add_prefix_space"))},
        "decoder": {**level, "add_prefix_space": True},
    }


def _neox(settings: Mapping[str, Any]) -> Spec:
    return {**_byte_level(settings), "normalizer": {"type": "NFC"}}


def _qwen(settings: Mapping[str, Any]) -> Spec:
    parts = _neox(settings)
    split = {"type": "Split", "pattern": {"Regex": _QWEN}, "behavior": "Isolated", "invert": False}
    level = {**parts["pre_tokenizer"], "use_regex": False}
    return {**parts, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}}


_END = "<|endoftext|>"
_SENTENCE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_INFILL = {
    "prefix_token": "▁<PRE>",
    "middle_token": "▁<MID>",
    "suffix_token": "▁<SUF>",
    "eot_token": "▁<EOT>",
    "fill_token": "<FILL_ME>",
}
_BYTES = {"fuse_unk": True, "byte_fallback": True}
_WORDS = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
REBUILT = {
    "LlamaTokenizer": Rebuilt(_llama, _SENTENCE, _BYTES),
    "CodeLlamaTokenizer": Rebuilt(_code_llama, _SENTENCE | _INFILL, {**_BYTES, "unk_token": None}),
    "GemmaTokenizer": Rebuilt(
        _gemma,
        {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"},
        {**_BYTES, "unk_token": None},
    ),
    "GPT2Tokenizer": Rebuilt(_byte_level, {"bos_token": _END, "eos_token": _END, "unk_token": _END}, _WORDS),
    "GPTNeoXTokenizer": Rebuilt(
        _neox,
        {"bos_token": _END, "eos_token": _END, "unk_token": _END, "pad_token": "<|padding|>"},
        _WORDS,
        keeps_post_processor=False,
    ),
    "Qwen2Tokenizer": Rebuilt(_qwen, {"eos_token": _END, "unk_token": _END, "pad_token": _END}, _WORDS, marks_special=True),
}
