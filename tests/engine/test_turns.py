"""Rotary embeddings that go by the length of a row: whoever grows beyond it, and whoever shares a beginning."""

import jax
import numpy as np
import pytest
import tiny

from jaxtp import LLM, Llama, SamplingParams
from jaxtp.config import Rope

SHORT, LONG = (1.0, 1.1, 1.3, 1.6), (1.0, 2.0, 5.0, 9.0)
TURN = 100
CASES = {
    "longrope": {
        "model_type": "phi3",
        "max_position_embeddings": 400,
        "rope": Rope(100.0, "longrope", 4.0, TURN, short_factor=SHORT, long_factor=LONG),
    },
    "dynamic": {"max_position_embeddings": TURN, "rope": Rope(100.0, "dynamic", 8.0)},
}
COMMON = np.random.default_rng(0).integers(3, 98, 90).tolist()  # more than a page
FEW, MANY = [*COMMON, 5], [*COMMON, *np.random.default_rng(1).integers(3, 98, 60).tolist()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def of(case):
        if case not in made:
            made[case] = tiny.checkpoint(tmp_path_factory.mktemp("model"), tokenizer=False, **CASES[case])
        return made[case]

    return of


def new(folder, **options):
    return LLM(folder, progress=False, max_model_len=300, **options)


def completed(llm, prompts, *, tokens=6):
    """(tokens, their log-probabilities) of each prompt, up to so many or, where it is a list, of each its own."""
    each = tokens if isinstance(tokens, list) else [tokens] * len(prompts)
    wanted = [SamplingParams(temperature=0, max_tokens=n, logprobs=1, ignore_eos=True) for n in each]
    outputs = [request.outputs[0] for request in llm.generate(prompts, wanted)]
    return [
        (output.token_ids, [found[token].logprob for token, found in zip(output.token_ids, output.logprobs, strict=True)])
        for output in outputs
    ]


@pytest.mark.parametrize("case", CASES)
def test_pages_are_shared_among_rows_whose_keys_are_turned_alike(folder, case):
    """A short prompt and a long one that begin alike, one after the other and together, as each does alone."""
    alone = [completed(new(folder(case)), [prompt])[0] for prompt in (FEW, MANY)]
    llm = new(folder(case))
    for prompts in ([FEW], [MANY], [MANY, FEW], [FEW]):
        for prompt, (tokens, logprobs) in zip(prompts, completed(llm, prompts), strict=True):
            assert tokens == alone[prompt is MANY][0]
            np.testing.assert_allclose(logprobs, alone[prompt is MANY][1], atol=1e-5, rtol=0)
    assert llm.engine.stats().prefix_hits > 0


@pytest.mark.parametrize(
    "options", [{}, {"max_num_seqs": 2}, {"pipeline_parallel_size": 2, "gpu_memory_utilization": 0.1}], ids=str
)
def test_rows_that_grow_beyond_the_context_of_pre_training_are_computed_anew(folder, options):
    """They reach it at different times, one at its prompt's end, one before; all end with 112 tokens, and the last of these is
    what the model makes of the others at once.
    """
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, 98, n).tolist() for n in (TURN, TURN - 1, 60, TURN + 1, 95, 99)]
    llm = new(folder("longrope"), **options)
    found = completed(llm, prompts, tokens=[112 - len(prompt) for prompt in prompts])
    model = Llama.from_pretrained(folder("longrope"), progress=False)
    whole = np.array([[*prompt, *tokens] for prompt, (tokens, _) in zip(prompts, found, strict=True)])
    last = jax.nn.log_softmax(np.asarray(model(whole[:, :-1]))[:, -1])
    assert last.argmax(axis=-1).tolist() == whole[:, -1].tolist()
    np.testing.assert_allclose(last.max(axis=-1), [logprobs[-1] for _, logprobs in found], atol=1e-5, rtol=0)
    assert llm.engine.stats().preemptions == 0
    llm.engine.check_integrity()
