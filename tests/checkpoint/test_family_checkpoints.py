"""Checkpoints that lie otherwise than Llama's: a language model beside a vision tower; norms whose neutral weight is 0."""

import json
import logging

import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.numpy import load_file, save_file

from jaxtp import LLM, Llama, SamplingParams, make_mesh
from jaxtp.config import Rope
from jaxtp.weights import variables

IDS = np.arange(3, 43).reshape(2, 20)
GEMMA3 = {
    **{"model_type": "gemma3_text", "norm_position": "both", "norm_form": "unit_offset", "activation": "gelu_tanh"},
    **{"qk_norm": True, "local_rope": Rope(100.0), "windows": (5, None), "attention_scale": 12**-0.5},
    **{"tie_word_embeddings": True, "scaled_embedding": True, "eos_token_ids": (1, 106), "bos_token_id": 2},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("text"), tokenizer=False, **GEMMA3)


def multimodal(text, folder, language, tower, **beside):
    """The same within a checkpoint of more than text, whose tensors begin so."""
    tensors = load_file(text / "model.safetensors")
    tensors = {language + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    extra = {f"{tower}.embeddings.weight": np.ones((2, 3), np.float32)}
    save_file({**tensors, **extra, **beside}, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "vision_config": {}}
    config["text_config"] = json.loads((text / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [1, 106]}))
    return folder


PUBLISHED = ("language_model.model.", "vision_tower.vision_model")
BY_TRANSFORMERS_5 = ("model.language_model.", "model.vision_tower")


@pytest.mark.parametrize("names", [PUBLISHED, BY_TRANSFORMERS_5])
def test_of_a_multimodal_checkpoint_the_text_is_loaded(text, tmp_path, names, caplog):
    caplog.set_level(logging.INFO, logger="jaxtp")
    folder = multimodal(text, tmp_path, *names)
    expected = Llama.from_pretrained(text, progress=False)
    model = Llama.from_pretrained(folder, mesh=make_mesh(tp=2), progress=False)
    assert "its text part is read" in caplog.text
    assert model.config == expected.config
    np.testing.assert_allclose(model(IDS), expected(IDS), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert type(again).__name__ == "Gemma3ForCausalLM"
    with torch.no_grad():
        np.testing.assert_allclose(again(torch.tensor(IDS)).logits.numpy(), expected(IDS), atol=1e-5, rtol=1e-5)


def test_what_its_language_model_lacks_or_has_too_much_is_listed(text, tmp_path):
    more = {"language_model.model.layers.0.mlp.bias": np.zeros(3, np.float32)}
    folder = multimodal(text, tmp_path, *PUBLISHED, **more)
    with pytest.raises(ValueError, match=r"unexpected: model\.layers\.0\.mlp\.bias$"):
        Llama.from_pretrained(folder, progress=False)


def test_random_norms_are_neutral_in_either_form():
    """1 + w of w = 0: as those of a Llama, whose weights are 1."""
    for changes, neutral in (({}, 1.0), (GEMMA3, 0.0)):
        model = Llama.random(tiny.config(**changes), mesh=make_mesh(tp=2))
        norms = [weight.get_value() for path, weight in variables(model) if "norm" in path]
        assert len(norms) > 4
        assert {float(value) for norm in norms for value in np.unique(norm)} == {neutral}


def test_stages_of_layers_that_differ_generate_as_one_device_does(tmp_path):
    folder = tiny.checkpoint(tmp_path, tokenizer=False, **{**GEMMA3, "num_layers": 4, "windows": (5, None, 5, None)})
    prompts, greedy = [[5, 9, 11], list(range(3, 25))], SamplingParams(temperature=0, max_tokens=12)
    found = []
    for split in ({}, {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}):
        llm = LLM(folder, max_model_len=48, progress=False, gpu_memory_utilization=0.1, **split)
        found.append([request.outputs[0].token_ids for request in llm.generate(prompts, greedy)])
    assert found[0] == found[1]
