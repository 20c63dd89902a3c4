"""Vocabularies that a mesh pads: also where a device's whole share is padding."""

import numpy as np
import pytest
import runs
import tiny

from jaxtp import LLM, Llama, SamplingParams, make_mesh
from jaxtp.checkpoint.names import TABLE


@pytest.mark.parametrize("shares", range(1, 10))
def test_shares_of_a_table_are_the_table_and_zeros(shares):
    """Every vocabulary of 1 to 60 rows, cut as a mesh cuts it: nothing is read twice, or from where the file ends."""
    for vocab in range(1, 61):
        held = -(-vocab // shares) * shares
        (part,) = TABLE["embed"][0].parts(tiny.config(vocab_size=vocab), (held, 3), "")
        table, read = np.arange(1, vocab * 3 + 1).reshape(vocab, 3), []

        def get(index, table=table, read=read):
            assert 0 <= index[0].start < index[0].stop <= len(table)  # safetensors refuses anything else
            read.extend(range(index[0].start, index[0].stop))
            return table[index]

        blocks = []
        for start in range(0, held, held // shares):
            blocks.append(np.full((held // shares, 3), -1))
            part.read(blocks[-1], (slice(start, start + held // shares), slice(0, 3)), (held, 3), get)
        whole = np.concatenate(blocks)
        np.testing.assert_array_equal(whole[:vocab], table)
        assert not whole[vocab:].any()
        assert read == list(range(vocab))
        np.testing.assert_array_equal(part.write(whole), table)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """41 rows: over eight devices six each, and the last has padding alone."""
    return tiny.checkpoint(tmp_path_factory.mktemp("padded"), tokenizer=False, vocab_size=41, num_kv_heads=8)


@pytest.mark.parametrize("vocab", [41, 5])
def test_they_are_loaded_computed_with_and_saved(vocab, tmp_path):
    """Also where five devices of eight hold a row each, and three none."""
    folder = tiny.checkpoint(tmp_path / "one", tokenizer=False, vocab_size=vocab, num_kv_heads=8, num_layers=1)
    tokens = np.array([[1, 3, 2, 4], [4, 4, 0, 1]])
    one = Llama.from_pretrained(folder, progress=False)
    many = Llama.from_pretrained(folder, mesh=make_mesh(tp=8), progress=False)
    np.testing.assert_allclose(many(tokens), one(tokens), atol=2e-5)
    many.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_tokens_are_those_of_one_device(folder):
    """Over tp, and over pp and tp together."""
    params, made = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True), []
    for tp, pp in ((1, 1), (8, 1), (4, 2)):
        llm = LLM(folder, tensor_parallel_size=tp, pipeline_parallel_size=pp, progress=False, max_model_len=64)
        made.append(llm.generate([[1, 2, 3]], params)[0].outputs[0].token_ids)
    assert made[0] == made[1] == made[2]


def test_training_s_losses_are_those_of_one_device():
    batch = runs.rows(0, batch=4, length=8, vocab=41)
    one, many = (runs.run(tiny.config(vocab_size=41, num_kv_heads=8), mesh=mesh) for mesh in ({}, {"pp": 2, "tp": 4}))
    for _ in range(2):
        wanted, found = one.step(batch).nats, many.step(batch, accumulate=2).nats
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
