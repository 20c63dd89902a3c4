"""Random tiny checkpoints made, run and read by transformers: what ours are compared with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from jaxtp import SamplingParams

SETTINGS = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
PROMPTS = [[5, 9, 11], list(range(3, 25)), [7], [100, 2, 8, 4, 4, 4, 60, 1, 99]]
NEW = 20  # tokens of a greedy completion


def written(folder: Path, family: str, options: dict[str, Any], change: Callable[[Any], None] = lambda model: None) -> Any:
    """transformers' model of that family (its classes' first word), written to a folder. change: what to do to its weights."""
    config = getattr(transformers, f"{family}{'Text' * (family == 'Gemma3')}Config")(**{**SETTINGS, **options})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            one = float("norm" in name and not family.startswith("Gemma"))
            weight.copy_(one + 0.1 * torch.randn_like(weight))
        change(model)
    model.save_pretrained(folder)
    return model


def tokens(rows: int) -> np.ndarray:
    """[rows, 24], always the same."""
    return np.random.default_rng(0).integers(0, 128, (rows, 24))


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """transformers' for a batch, [rows, T, V]."""
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def greedy(model: Any, prompt: list[int]) -> tuple[list[int], np.ndarray]:
    """NEW tokens, one by one over transformers' own cache, and the log-probabilities where each was chosen, [NEW, V]."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    out = model.generate(torch.tensor([prompt]), **settings, output_logits=True, return_dict_in_generate=True)
    return out.sequences[0, len(prompt) :].tolist(), torch.log_softmax(torch.cat(out.logits), dim=-1).numpy()


def same(llm: Any, expected: list[tuple[list[int], np.ndarray]]) -> None:
    """Asserts that its greedy completions of PROMPTS are these tokens, and its log-probabilities of the likeliest these."""
    asked = SamplingParams(temperature=0, max_tokens=NEW, logprobs=8)
    for request, (tokens, scores) in zip(llm.generate(PROMPTS, asked), expected, strict=True):
        (found,) = request.outputs
        assert found.token_ids == tokens
        for likeliest, theirs in zip(found.logprobs, scores, strict=True):
            ids = list(likeliest)
            np.testing.assert_allclose([likeliest[i].logprob for i in ids], theirs[ids], atol=1e-5, rtol=1e-5)


def read_again(folder: Path) -> Any:
    """A checkpoint that we wrote, by transformers."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
