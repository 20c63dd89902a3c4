"""The model that ships: small enough, good enough, and the same on every mesh."""

import numpy as np
import pytest
from conftest import shared

from jaxtp import LLM, Llama, SamplingParams, make_mesh
from jaxtp.checkpoint.hf import DEMO

MOST_BYTES, MOST_NATS = 8 * 2**20, 1.60


def test_it_is_small():
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= MOST_BYTES
    assert (DEMO / "model.safetensors").exists()


@pytest.mark.parametrize("mesh", [(2, 1), (4, 1), (2, 4), (1, 8)], ids=str)
def test_it_writes_the_same_on_every_mesh(mesh):
    tp, dp = mesh
    params = SamplingParams(temperature=0, max_tokens=40)
    prompts = ["ROMEO:\n", "To be, or "]
    alone = LLM("demo", dtype="float32", progress=False).generate(prompts, params)
    other = LLM("demo", dtype="float32", tensor_parallel_size=tp, data_parallel_size=dp, progress=False)
    for a, b in zip(alone, other.generate(prompts, params), strict=True):
        assert a.outputs[0].text == b.outputs[0].text
        assert len(a.outputs[0].text) == 40


@pytest.mark.slow
def test_its_validation_loss():
    """Nats per character over the last tenth of the text that it was trained on the rest of."""
    text = shared("tinyshakespeare.txt").read_text()
    llm = LLM("demo", dtype="float32", progress=False)
    ids = np.array(llm.tokenizer.encode(text, add_special_tokens=False), np.int32)
    held = ids[round(len(ids) * 0.9) :]
    length, rows = 256, 40
    count = (len(held) - 1) // length // rows * rows
    windows = np.stack([held[i * length : i * length + length + 1] for i in range(count)])
    model = Llama.from_pretrained("demo", mesh=make_mesh(dp=8), dtype="float32", progress=False)
    nats = []
    for start in range(0, count, rows):
        part = windows[start : start + rows]
        logits = np.asarray(model(part[:, :-1]), np.float64)
        top = logits.max(-1, keepdims=True)
        log_z = top[..., 0] + np.log(np.exp(logits - top).sum(-1))
        nats.append(log_z - np.take_along_axis(logits, part[:, 1:, None], -1)[..., 0])
    assert np.mean(nats) <= MOST_NATS
