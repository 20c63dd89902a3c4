"""LLM over pp: groups of rows circulate through the stages, and every one gets the tokens that one device gives it."""

import dataclasses
import itertools
import logging

import numpy as np
import pytest
import tiny

from jaxtp import LLM, Llama, Rules, SamplingParams, describe, draw_schedule, make_mesh
from jaxtp.buckets import filling
from jaxtp.generate.batch import Batch, batch_size, slots_needed
from jaxtp.parallel.circulate import staged
from jaxtp.parallel.schedules import Circulation
from jaxtp.parallel.stages import Stages
from jaxtp.sharding import layers_of, variables

# a row alone, fewer rows than stages, a group that is not full, and full ones
MESHES = [
    ({"pipeline_parallel_size": 2}, (1, 16)),
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
    return LLM(stories, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "counts"), MESHES, ids=str)
def test_the_tokens_of_one_device(stories, one_device, mesh, counts):
    """stories260k has 5 layers, so that stages are uneven."""
    llm = LLM(stories, progress=False, **mesh)
    for count in counts:
        asked = several(count, seed=count)
        assert tokens(llm.generate(*asked)) == tokens(one_device.generate(*asked)), f"{count} rows"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("model"), num_layers=4, qkv_bias=True, o_bias=True)


@pytest.fixture(scope="module")
def plain(folder):
    return LLM(folder, progress=False)


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, progress=False, pipeline_parallel_size=2, tensor_parallel_size=2)


@pytest.mark.parametrize(("more", "count"), [({}, 2), ({"tensor_parallel_size": 2, "sequence_parallel": True}, 6)], ids=str)
def test_prompts_go_through_the_stages_in_chunks(folder, plain, more, count):
    chunked = LLM(folder, progress=False, pipeline_parallel_size=4, max_num_batched_tokens=32 * 8, **more)
    asked = several(count, seed=3, longest=300)
    asked[0][0] = [7] * 300  # chunks of 128, or of 32
    assert tokens(chunked.generate(*asked)) == tokens(plain.generate(*asked))


@pytest.mark.slow
def test_the_cache_grows_while_tokens_are_on_their_way(llm, plain):
    asked = [[5, 6, 7], [9] * 40, [8, 8]], SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    found = tokens(llm.generate(*asked))
    assert found == tokens(plain.generate(*asked))
    assert all(len(row) == 300 for (row,) in found)  # 128, then 256, then 512 slots


def test_everything_that_requests_can_ask_for(llm, plain):
    params = [
        SamplingParams(temperature=0, max_tokens=30, repetition_penalty=1.3, logprobs=3),
        SamplingParams(temperature=0.7, seed=5, max_tokens=30, presence_penalty=0.5, min_tokens=10, n=2),
        SamplingParams(temperature=0, max_tokens=30, stop=["e"], logit_bias={10: 4.0}),
    ]
    prompts, params = several(6, seed=5, params=params)
    ours, theirs = llm.generate(prompts, params), plain.generate(prompts, params)
    assert tokens(ours) == tokens(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a.outputs, b.outputs, strict=True):
            assert (x.text, x.finish_reason, x.stop_reason) == (y.text, y.finish_reason, y.stop_reason)
            for mine, other in zip(x.logprobs or [], y.logprobs or [], strict=True):
                assert mine.keys() == other.keys()
                assert all(abs(mine[t].logprob - other[t].logprob) < 1e-5 for t in mine)


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
    llm = LLM(folder, pipeline_parallel_size=4)
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
    llm = LLM(folder, progress=False, pipeline_parallel_size=2, layers_per_stage=[1, 3])
    assert llm.model.stacks == ((0, 1), (None, 2), (None, 3))
    asked = several(3, seed=12)
    assert tokens(llm.generate(*asked)) == tokens(plain.generate(*asked))


def test_chunks_that_are_alike_count_whole_in_the_budget(folder):
    llm = LLM(folder, progress=False, pipeline_parallel_size=4)
    _, rows = llm._requests_of([[5] * 400] * 8, SamplingParams(max_tokens=1))
    batch = Batch(llm.model, llm.programs, rows, chunk_tokens=8 * 32)
    start, count = batch.chunks[-1]
    assert slots_needed(llm.model, rows, 8 * 32) >= batch.size * max(batch.slots, start + count)


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


# -- the table -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", range(1, 9))
def test_circulation(ranks):
    for count in range(1, 2 * ranks + 1):
        groups = Circulation.groups_of(count, ranks)
        assert ranks % groups == 0
        assert groups >= min(count, ranks)
        for ring in (Circulation.decode(ranks, groups), Circulation.prefill(ranks, groups)):
            steady = range(ranks - 1, ranks - 1 + 4 * ring.period)
            work = {(tick, rank): ring.group(tick, rank) for tick in range(steady.stop + ranks) for rank in range(ranks)}
            # from one rank to the next from one tick to the next, and each group into the same place of a rank every time
            assert all(work[t, r] == work[t + 1, r + 1] for t, r in work if r + 1 < ranks and (t + 1, r + 1) in work)
            places = {(rank, group): {ring.place(t) for t, r in work if r == rank and work[t, r] == group} for rank, group in
                      itertools.product(range(ranks), range(groups))}  # fmt: skip
            assert all(len(found) == 1 for found in places.values())
            assert all(
                len({*places[rank, g]} | {*places[rank, h]}) == 2
                for rank in range(ranks)
                for g in range(groups)
                for h in range(g)
            )
            idle = sum(work[t, r] is None for t in steady for r in range(ranks)) / len(steady) / ranks
            assert idle == pytest.approx(ring.idle)
        assert Circulation.decode(ranks, groups).idle == (0 if count >= ranks else 1 - groups / ranks)
        assert Circulation.prefill(ranks, groups).idle == 0


def test_groups_that_would_not_keep_their_places():
    with pytest.raises(ValueError, match="3 groups that come every 4 ticks: the groups must divide the ticks"):
        Circulation.decode(4, 3)


def test_the_picture_of_a_circulation():
    pytest.importorskip("matplotlib")
    (axes,) = draw_schedule(Circulation.decode(4, 2)).axes
    bars = {(int(bar.get_y() + 0.5), round(bar.get_x())) for bar in axes.patches}
    assert bars == {(r, t) for r in range(4) for t in range(15) if Circulation.decode(4, 2).group(t, r) is not None}


def test_a_group_comes_back_when_its_token_is_known():
    ring = Circulation.decode(4, 4)
    assert [ring.group(tick, 0) for tick in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [ring.group(tick, 3) for tick in range(8)] == [None, None, None, 0, 1, 2, 3, 0]


def test_rows_and_chunks_fill_the_stages(llm):
    assert [batch_size(llm.model, rows) for rows in (1, 2, 3, 5, 16)] == [(1, 1), (2, 2), (4, 2), (8, 2), (16, 2)]
    assert filling(8192, 4, 1, 1) == 768  # 12 chunks wanted; 683 is no bucket
    assert filling(100, 4, 4, 1) == 512  # a chunk is no smaller than what keeps a GPU busy
    assert filling(8192, 2, 2, 8) == 4096
