"""Norms and scaled embeddings in 16 bits are transformers', to the bit: where each family rounds."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from jaxtp import Llama
from jaxtp.ops.norm import rms_norm

D = 48


def both(*shape: int) -> tuple[torch.Tensor, jnp.ndarray]:
    x = torch.from_numpy(np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)).bfloat16()
    return x, jnp.asarray(x.float().numpy()).astype(jnp.bfloat16)


@pytest.mark.parametrize(
    ("form", "theirs"), [("rounded", LlamaRMSNorm), ("float32", Olmo2RMSNorm), ("unit_offset", Gemma2RMSNorm)]
)
def test_norms_round_where_transformers_does(form, theirs):
    (x, ours_x), (weight, ours_weight) = both(64, 8, D), both(D)
    norm = theirs(D, eps=1e-6)
    norm.weight.data = weight
    expected = norm(x).float().detach().numpy()
    found = np.asarray(rms_norm(ours_x, ours_weight, eps=1e-6, form=form), np.float32)
    assert (found == expected).mean() > 0.999  # the mean of squares is summed in another order
    others = {"rounded", "float32", "unit_offset"} - {form}
    for other in others:
        assert (np.asarray(rms_norm(ours_x, ours_weight, eps=1e-6, form=other), np.float32) == expected).mean() < 0.9


def test_embeddings_round_where_transformers_does():
    """Gemma's factor is rounded to the model's dtype, Granite's is not."""
    table, ours = both(128, D)
    ids = np.arange(128)[None]
    gemma = GemmaTextScaledWordEmbedding(128, D, 0, embed_scale=D**0.5).bfloat16()
    gemma.weight.data = table
    granite = table[torch.from_numpy(ids)] * 11.3
    for settings, expected in (
        ({"scaled_embedding": True}, gemma(torch.from_numpy(ids))),
        ({"embedding_multiplier": 11.3}, granite),
    ):
        model = Llama.random(tiny.config(hidden_size=D, vocab_size=128, **settings), dtype="bfloat16")
        model.embed[...] = ours
        found = np.asarray(model.embedded(ids), np.float32)
        np.testing.assert_array_equal(found, expected.float().detach().numpy())
