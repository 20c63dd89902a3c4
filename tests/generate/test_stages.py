"""LLM over pp: rows follow each other through the stages, and every one gets the tokens that one device gives it."""

import dataclasses
import logging

import numpy as np
import pytest
import tiny

from jaxtp import LLM, Llama, Rules, SamplingParams, describe, make_mesh
from jaxtp.parallel.circulate import staged
from jaxtp.parallel.stages import Stages
from jaxtp.weights import layers_of, variables

# a row alone, fewer rows than stages, rows that the stages do not divide, and many
MESHES = [
    ({"pipeline_parallel_size": 2}, (16,)),
    ({"pipeline_parallel_size": 4}, (2, 7)),
    ({"pipeline_parallel_size": 2, "tensor_parallel_size": 2}, (16,)),
    ({"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "data_parallel_size": 2}, (1, 7)),
]
# greedy and sampled rows side by side, and one that ends early
PARAMS = [
    SamplingParams(temperature=0, max_tokens=24),
    SamplingParams(temperature=0.9, seed=1, max_tokens=24),
    SamplingParams(temperature=1.1, top_p=0.9, top_k=40, seed=2, max_tokens=20),
    SamplingParams(temperature=0, max_tokens=3),
]


def tokens(requests):
    return [[output.token_ids for output in request.outputs] for request in requests]


def several(count, seed=0, longest=40, params=PARAMS):
    prompts = tiny.prompts(count, longest=longest, seed=seed)
    return prompts, [params[i % len(params)] for i in range(count)]


@pytest.fixture(scope="module")
def one_device(stories):
    return tiny.coarse(LLM(stories, progress=False))


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "counts"), MESHES, ids=str)
def test_the_tokens_of_one_device(stories, one_device, mesh, counts):
    """stories260k has 5 layers, so that stages are uneven."""
    llm = tiny.coarse(LLM(stories, progress=False, **mesh))
    for count in counts:
        asked = several(count, seed=count)
        assert tokens(llm.generate(*asked)) == tokens(one_device.generate(*asked)), f"{count} rows"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("model"), num_layers=4, qkv_bias=True, o_bias=True)


@pytest.fixture(scope="module")
def plain(folder):
    return tiny.coarse(LLM(folder, progress=False))


@pytest.fixture(scope="module")
def llm(folder):
    return tiny.coarse(LLM(folder, progress=False, pipeline_parallel_size=2, tensor_parallel_size=2))


@pytest.mark.parametrize(("more", "count"), [({}, 2), ({"tensor_parallel_size": 2, "sequence_parallel": True}, 6)], ids=str)
def test_prompts_go_through_the_stages_in_chunks(folder, plain, more, count):
    chunked = tiny.coarse(LLM(folder, progress=False, pipeline_parallel_size=4, max_num_batched_tokens=64, **more))
    asked = several(count, seed=3, longest=300)
    asked[0][0] = [7] * 300  # ten chunks, at most two a tick
    assert tokens(chunked.generate(*asked)) == tokens(plain.generate(*asked))


@pytest.mark.slow
def test_pages_are_added_while_tokens_are_on_their_way(llm, plain):
    asked = [[5, 6, 7], [9] * 40, [8, 8]], SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    found = tokens(llm.generate(*asked))
    assert found == tokens(plain.generate(*asked))
    assert all(len(row) == 300 for (row,) in found)  # five pages each


def test_everything_that_requests_can_ask_for(llm, plain):
    params = [
        SamplingParams(temperature=0, max_tokens=30, repetition_penalty=1.3, logprobs=3),
        SamplingParams(temperature=0.7, seed=5, max_tokens=30, presence_penalty=0.5, min_tokens=10, n=2),
        SamplingParams(temperature=0, max_tokens=30, stop=["e"], logit_bias={10: 4.0}),
    ]
    prompts, params = several(6, seed=5, params=params)
    tiny.same_answers(llm.generate(prompts, params), plain.generate(prompts, params))


def test_a_stream_gives_a_token_of_every_row_at_a_time(llm, plain):
    prompts, params = several(3, seed=6, params=[SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)])
    whole = plain.generate(prompts, params)
    seen = [len(request.outputs[0].token_ids) for request in llm.stream(prompts, params)]
    assert seen == [n for n in range(1, 11) for _ in range(3)]
    *_, first, second, third = llm.stream(prompts, params)
    assert sorted(tokens([first, second, third])) == sorted(tokens(whole))


def test_nothing_compiles_twice(llm):
    prompts, params = several(4, seed=8, params=PARAMS[:1])
    llm.generate(prompts, params)
    before = llm.programs.compile_seconds
    llm.generate(*several(4, seed=9, params=PARAMS[:1]))
    assert llm.programs.compile_seconds == before


def test_fewer_rows_than_stages_say_what_they_waste(folder, caplog):
    llm = tiny.coarse(LLM(folder, pipeline_parallel_size=4))
    with caplog.at_level(logging.WARNING, "jaxtp"):
        llm.generate([[5]], SamplingParams(max_tokens=2))
        llm.generate([[6]], SamplingParams(max_tokens=2))
        llm.generate([[5]] * 4, SamplingParams(max_tokens=2))
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "1 row on pp=4: each stage works in 1 of 4 ticks, 4 rows would keep all busy"
    ]


def test_uneven_stages_are_told(stories, caplog):
    with caplog.at_level(logging.INFO, "jaxtp"):
        llm = LLM(stories, progress=False, pipeline_parallel_size=4)
    assert "5 layers on 4 stages (2, 1, 1, 1); uneven: empty slots add 60.0% to the blocks' time and memory" in caplog.text
    assert "60.0%" in describe(llm.model).note


def test_stages_of_given_sizes(folder, plain):
    llm = tiny.coarse(LLM(folder, progress=False, pipeline_parallel_size=2, layers_per_stage=[1, 3]))
    assert llm.model.stacks == ((0, 1), (None, 2), (None, 3))
    asked = several(3, seed=12)
    assert tokens(llm.generate(*asked)) == tokens(plain.generate(*asked))


def test_interleaved_stages_are_not_generated_with(folder):
    config = tiny.config(num_layers=4)
    layout = staged(Stages.split(4, ranks=2, chunks=2), rules=Rules())
    with pytest.raises(ValueError, match=r"the layers of its ranks are \[\[0, 2\], \[1, 3\]\]; generation needs"):
        LLM(Llama.random(config, mesh=make_mesh(pp=2), **layout), progress=False)


def test_random_stacks_are_drawn_where_they_lie():
    made = Llama.random(tiny.config(num_layers=4), mesh=make_mesh(pp=4), **staged(Stages.split(4, ranks=4), rules=Rules()))
    assert made.layers[0].mlp.down[...].sharding.shard_shape((4, 64, 96)) == (1, 64, 96)


def test_what_cannot_be_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"pp=8.* makes 8 stages of 4 layers; legal pp with them: 1, 2, 3, 4"):
        LLM(folder, progress=False, pipeline_parallel_size=8)
    with pytest.raises(ValueError, match="pp=4 × tp=4 needs 16 devices, 8 are there"):
        LLM(folder, progress=False, pipeline_parallel_size=4, tensor_parallel_size=4)
    with pytest.raises(ValueError, match=r"layers_per_stage=\[3, 2\] makes 5 layers; the model has 4"):
        LLM(folder, progress=False, pipeline_parallel_size=2, layers_per_stage=[3, 2])
    config = tiny.config(num_layers=4)
    pattern = dataclasses.replace(config, windows=(8, None, None, None))
    with pytest.raises(ValueError, match="a stage must hold a whole number of the pattern"):
        Llama(pattern, mesh=make_mesh(pp=2), **staged(Stages.split(4, ranks=2), rules=Rules()))
    stacks = staged(Stages.split(4, ranks=2), rules=Rules())
    different = Rules(overrides=(("layers.3.mlp.down", (("mlp", None),)),)).pipeline_parallel()
    with pytest.raises(ValueError, match=r"layers 1 and 3 would stand in the same place .* differ"):
        Llama(config, mesh=make_mesh(pp=2), **{**stacks, "rules": different})


def test_only_generation_runs_stages(llm):
    with pytest.raises(ValueError, match="this model's layers stand in 2 stages, which LLM runs"):
        llm.model([[1, 2, 3]])


def test_a_checkpoint_of_stages_is_the_same_checkpoint(folder, llm, plain, tmp_path):
    llm.model.save_pretrained(tmp_path / "copy")
    asked = several(3, seed=10)
    again = LLM(tmp_path / "copy", tokenizer=folder, progress=False)
    assert tokens(again.generate(*asked)) == tokens(plain.generate(*asked))


def test_random_weights_do_not_depend_on_stages():
    config = tiny.config(num_layers=5)
    one = dict(variables(Llama.random(config)))
    for path, weight in variables(
        Llama.random(config, mesh=make_mesh(pp=3), **staged(Stages.split(5, ranks=3), rules=Rules()))
    ):
        array = np.asarray(weight.get_value())
        for name, row in zip(layers_of(path, weight), array if "layers" in path else [array], strict=True):
            expected = np.zeros_like(row) if name is None else np.asarray(one[name].get_value())
            np.testing.assert_array_equal(row[: len(expected)], expected)
