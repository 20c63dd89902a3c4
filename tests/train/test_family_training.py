"""What families have that Llama has not, trained over every axis of the mesh: losses as on one device."""

import functools

import numpy as np
import pytest
import tiny
from runs import packed, run
from test_step import GEMMA3, OLMO2

FAMILIES = {
    "gemma 3": {**GEMMA3, "attention_softcap": 2.0, "logits_softcap": 3.0, "num_layers": 4, "windows": (5, None, 5, None)},
    "olmo 2, granite": {**OLMO2, "num_kv_heads": 2, "num_layers": 4, "residual_multiplier": 0.4, "logits_scaling": 2.5},
}
LAYOUTS = {
    "tp, copies of KV heads": {"mesh": {"tp": 4}},
    "zero 3, sequence parallel": {"mesh": {"dp": 2, "tp": 4}, "zero": 3, "sequence_parallel": True, "remat": "full"},
    "stages": {"mesh": {"dp": 2, "pp": 2, "tp": 2}, "zero": 1},
}


def losses(family, **settings):
    made = run(tiny.config(**FAMILIES[family]), **settings)
    accumulate = 2 if settings.get("mesh", {}).get("pp") else 1
    return [float(made.step(packed(i), accumulate=accumulate).nats) for i in range(4)]


alone = functools.cache(losses)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_the_same_everywhere(family, layout):
    np.testing.assert_allclose(losses(family, **LAYOUTS[layout]), alone(family), atol=1e-5, rtol=0)
