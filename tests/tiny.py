"""Tiny random checkpoints and models for the tests."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxtp import LLM, Llama, ModelConfig, make_mesh
from jaxtp.weights import variables

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    max_position_embeddings=512,
    eos_token_ids=(2,),
    bos_token_id=1,
)


def config(**changes) -> ModelConfig:
    """The tiny config with some fields changed."""
    return dataclasses.replace(CONFIG, **{"windows": (), **changes})


def checkpoint(folder: Path, *, tokenizer: bool = True, seed: int = 0, **changes) -> Path:
    """A folder with random weights large enough to give lively logits, and a tokenizer with a token for each byte."""
    model = Llama.random(config(**changes), mesh=make_mesh(), seed=seed)
    for path, weight in variables(model):
        if "norm" not in path:
            weight.set_value(weight.get_value() * 6)
    model.save_pretrained(folder)
    if tokenizer:
        byte_tokenizer(folder, model.config.vocab_size)
    return folder


def byte_tokenizer(folder: Path, size: int) -> None:
    """ids 0 to 2 are <unk>, <s>, </s>; then the printable ASCII characters."""
    letters = ["<unk>", "<s>", "</s>", *(chr(c) for c in range(32, 127))]
    vocab = {letter: i for i, letter in enumerate(letters)}
    assert len(vocab) <= size
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def coarse(llm: LLM) -> LLM:
    """The same, with fewer shapes of steps, so that fewer programs are compiled."""
    llm.engine.buckets = dataclasses.replace(llm.engine.buckets, factor=4)
    return llm


def prompts(count: int, *, longest: int, seed: int = 0) -> list[list[int]]:
    """Token ids of ragged prompts."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 98, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def same_answers(ours, theirs) -> None:
    """Texts, why they end, and logprobs of two runs of the same requests."""
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a.outputs, b.outputs, strict=True):
            assert (x.token_ids, x.text, x.finish_reason, x.stop_reason) == (
                y.token_ids,
                y.text,
                y.finish_reason,
                y.stop_reason,
            )
            for mine, other in zip(x.logprobs or [], y.logprobs or [], strict=True):
                assert mine.keys() == other.keys()
                assert all(abs(mine[t].logprob - other[t].logprob) < 1e-5 for t in mine)
