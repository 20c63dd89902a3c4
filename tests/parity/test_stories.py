"""A real checkpoint: the same text as transformers, on every mesh."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxtp import LLM, SamplingParams

PROMPTS = ["", "Once upon a time, there was a cat", "Lily", "The big dog and the little bird were friends."]
NEW = 120
MESHES = [
    {},
    {"tensor_parallel_size": 2},
    {"tensor_parallel_size": 4},
    {"tensor_parallel_size": 2, "sequence_parallel": True},
    {"tensor_parallel_size": 4, "sequence_parallel": True},
    {"data_parallel_size": 2, "tensor_parallel_size": 4},
    {"data_parallel_size": 2, "tensor_parallel_size": 4, "sequence_parallel": True},
    {"data_parallel_size": 8},
]


@pytest.fixture(scope="module")
def expected(stories):
    """Greedy token ids and full text of each prompt, from transformers."""
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0]
        found.append((out[ids.shape[1] :].tolist(), tokenizer.decode(out, skip_special_tokens=True)))
    return found


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_greedy_text_equals_transformers(stories, expected, mesh):
    llm = LLM(stories, progress=False, **mesh)
    requests = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=NEW))
    assert [r.outputs[0].token_ids for r in requests] == [ids for ids, _ in expected]
    assert [p + r.outputs[0].text for p, r in zip(PROMPTS, requests, strict=True)] == [text for _, text in expected]
    assert (
        requests[0]
        .outputs[0]
        .text.startswith("Once upon a time, there was a little girl named Lily. She loved to play outside in the park.")
    )


def test_tp_8_is_refused_with_the_legal_sizes(stories):
    with pytest.raises(ValueError, match=r"tp=8 does not divide the MLP width 172; legal tp for this model: 1, 2, 4"):
        LLM(stories, tensor_parallel_size=8, progress=False)
