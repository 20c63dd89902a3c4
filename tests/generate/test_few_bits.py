"""Weights in few bits without a checkpoint, compiled ahead as the engine does; also where JAX packs 4 bits (0.11 and up)."""

import json

import pytest
import tiny

from jaxtp import LLM, SamplingParams

SAID = [
    {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True},
    {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": True},
    {"quant_method": "fp8", "activation_scheme": "static"},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
]


@pytest.mark.parametrize("said", SAID, ids=lambda said: said["quant_method"])
@pytest.mark.parametrize("mesh", [{}, {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}], ids=str)
def test_random_weights_of_every_form_run(tmp_path, said, mesh):
    """For speed tests: of a config alone, with what its checkpoints hold."""
    config = {**tiny.config(intermediate_size=128).to_hf(), "quantization_config": said}
    (tmp_path / "config.json").write_text(json.dumps(config))
    llm = LLM(tmp_path, load_format="dummy", dtype="float32", progress=False, **mesh)
    kernel = llm.model.layers[0].mlp.down.get_value()
    assert (kernel.shift is None) == (said["quant_method"] != "awq")
    assert (kernel.order is None) == (said["quant_method"] != "gptq")
    assert (kernel.input_scale is None) == (said["quant_method"] != "fp8")
    assert len(llm.generate([[5, 6]], SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids) == 3
