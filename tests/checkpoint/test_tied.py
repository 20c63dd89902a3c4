"""Embedding and head in one table or in two, in every form that files have them."""

import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from jaxtp import LLM, Llama, describe, make_mesh, plan
from jaxtp.checkpoint import hf

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = np.array([[3, 5, 7, 11], [1, 2, 3, 4]])


@pytest.fixture
def folder(tmp_path):
    """Says that it is tied; 130 rows, which tp=4 pads."""
    sizes = {"vocab_size": 130, "num_layers": 1, "tie_word_embeddings": True}
    return tiny.checkpoint(tmp_path / "tied", tokenizer=False, **sizes)


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def logits(model) -> np.ndarray:
    return np.asarray(model(TOKENS))


def theirs(folder) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def head_only(tensors):
    tensors[HEAD] = tensors.pop(EMBED)


def both_alike(tensors):
    tensors[HEAD] = tensors[EMBED].copy()


def another_head(tensors):
    tensors[HEAD] = tensors[EMBED][::-1].copy()


@pytest.mark.parametrize(
    ("change", "tied"), [(lambda tensors: None, True), (head_only, True), (both_alike, True), (another_head, False)]
)
def test_as_transformers_reads_it(folder, tmp_path, change, tied, caplog):
    """Logits on a mesh that pads the vocabulary; what is saved is read alike; counts and plans are of what was loaded."""
    rewrite(folder, change)
    expected = theirs(folder)
    model = Llama.from_pretrained(folder, mesh=make_mesh(tp=4), progress=False)
    np.testing.assert_allclose(logits(model), expected, atol=2e-5)
    assert model.config.tie_word_embeddings == tied
    assert ("are not tied" in caplog.text) == (not tied)
    assert ("head" in [weight.path for weight in describe(model).weights]) == (not tied)
    assert model.config.num_params == sum(a.size for a in load_file(folder / "model.safetensors").values()) - (
        130 * 64 if change is both_alike else 0
    )
    assert plan(str(folder), "1xH100", prompt_len=8, output_len=8).best.config == model.config
    model.save_pretrained(tmp_path / "again")
    assert (HEAD in load_file(tmp_path / "again" / "model.safetensors")) == (not tied)
    np.testing.assert_array_equal(theirs(tmp_path / "again"), expected)


def test_llm_and_plans_see_two_tables_as_well(folder):
    rewrite(folder, another_head)
    llm = LLM(folder, progress=False, max_model_len=64)
    assert llm.model.head is not None
    assert llm.budget.weight_bytes == 4 * llm.config.num_params


@pytest.mark.parametrize("rows", [-1, 0])
def test_a_difference_in_any_row_counts(folder, rows, monkeypatch):
    """Also beyond the first block that is compared, and in the last."""
    monkeypatch.setattr(hf, "_ROWS", 32)
    rewrite(folder, both_alike)
    assert hf.config_of(folder).tie_word_embeddings

    def spoil(tensors):
        tensors[HEAD][rows, 5] += 1

    rewrite(folder, spoil)
    assert not hf.config_of(folder).tie_word_embeddings


def test_a_second_table_that_rounds_to_the_first_is_no_other(folder):
    """As transformers, which compares what it has loaded: in the dtype of config.json."""

    def nearly(tensors):
        tensors[EMBED] = tensors[EMBED].astype(ml_dtypes.bfloat16).astype(np.float32)
        tensors[HEAD] = tensors[EMBED] * np.float32(1 + 2**-20)

    rewrite(folder, nearly)
    assert not hf.config_of(folder).tie_word_embeddings
    assert hf.config_of(folder, overrides={"dtype": "bfloat16"}).tie_word_embeddings
    for dtype, tied in ((torch.float32, False), (torch.bfloat16, True)):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_neither_table_and_no_head(folder):
    rewrite(folder, lambda tensors: tensors.pop(EMBED))
    with pytest.raises(ValueError, match=r"missing: model\.embed_tokens\.weight"):
        Llama.from_pretrained(folder, progress=False)


def test_an_untied_config_without_a_head_names_the_way_out(folder):
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight; .*\{\"tie_word_embeddings\": True\}") as error:
        Llama.from_pretrained(folder, progress=False, hf_overrides={"tie_word_embeddings": False})
    assert "\n" not in str(error.value)


def test_a_file_without_a_dtype_in_its_config(tmp_path):
    """The first float's, as transformers decides; float32 where there is none that can be computed in."""
    folder = tiny.checkpoint(tmp_path / "x", tokenizer=False, num_layers=1)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"torch_dtype": "float32"', '"torch_dtype": null'))

    def stored(dtype):
        rewrite(folder, lambda tensors: tensors.update({k: v.astype(dtype) for k, v in tensors.items()}))
        return Llama.from_pretrained(folder, progress=False).layout.dtype.name

    assert stored(np.float16) == "float16"
    assert str(transformers.AutoModelForCausalLM.from_pretrained(folder).dtype) == "torch.float16"
    assert stored(ml_dtypes.bfloat16) == "bfloat16"
    assert LLM(folder, progress=False, max_model_len=64).model.layout.dtype == "bfloat16"
    assert stored(np.float64) == "float32"
    (folder / "model.safetensors").unlink()
    assert hf.config_of(folder).dtype is None  # a plan needs no weights
