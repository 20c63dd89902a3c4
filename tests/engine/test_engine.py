"""The engine's promise: in float32 a request's tokens are the same alone or among others, on every mesh, whatever happens."""

import dataclasses
import functools
import itertools
import random

import pytest
import tiny

from jaxtp import LLM, Llama, SamplingParams, make_mesh
from jaxtp.engine.build import build
from jaxtp.engine.features import EVERYTHING
from jaxtp.engine.programs import Programs
from jaxtp.engine.step import CALL_STEPS
from jaxtp.parallel.circulate import staged
from jaxtp.parallel.stages import Stages
from jaxtp.sharding import Rules
from jaxtp.text import Tokenizer

MESHES = [{}, {"tp": 2}, {"tp": 4}, {"dp": 2, "tp": 2}, {"pp": 2, "tp": 2}, {"dp": 2, "pp": 2, "tp": 2}]
KINDS = [
    {"temperature": 0},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 1.1, "top_p": 0.9, "top_k": 40, "seed": 5},
    {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 0.8, "seed": 7, "presence_penalty": 1.0, "min_p": 0.05, "n": 3},
    {"temperature": 1.0, "seed": 11, "stop": ["e", "a"], "min_tokens": 4},
    {"temperature": 0, "logit_bias": {40: 5.0, 41: -100.0}},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("engine"), num_layers=4)


def load():
    """What comes: prompts of which many begin alike, each with its parameters."""
    rng = random.Random(1)
    beginning = [rng.randrange(3, 98) for _ in range(70)]
    for i in range(32):
        ids = beginning[: rng.choice([0, 0, 33, 64, 70])] + [rng.randrange(3, 98) for _ in range(rng.randrange(1, 40))]
        yield ids, SamplingParams(**KINDS[i % len(KINDS)], max_tokens=rng.randrange(4, 30), ignore_eos=True)


@functools.cache
def programs_on(folder, mesh):
    """A model and its programs, which the engines of a mesh share."""
    sizes = dict(mesh)
    if "pp" in sizes:
        config = tiny.config(num_layers=4)
        layout = staged(Stages.split(config.num_layers, ranks=sizes["pp"]), rules=Rules())
        model = Llama(config, mesh=make_mesh(**sizes), **layout).load(folder, progress=False)
    else:
        model = Llama.from_pretrained(folder, mesh=make_mesh(**sizes), progress=False)
    return model, Programs(model)


def engine_on(folder, mesh, programs=None, **options):
    """An engine whose programs know all of sampling, so that there are few of them; on two devices there are more."""
    model, shared = programs_on(folder, tuple(mesh.items()))
    groups = mesh.get("dp", 1)
    small = {"cache_tokens": 16 * 16 * groups, "max_num_batched_tokens": 96 * groups}  # of which all programs know
    options = {**small, "max_model_len": 256, "max_num_seqs": 8, "page_size": 16, **options}
    made = build(model, programs or shared, tokenizer=Tokenizer(folder), **options)
    made.asked.wanted = lambda: EVERYTHING
    made.cards.widen([], stops=4, biases=2)
    made.buckets = dataclasses.replace(made.buckets, factor=8 if mesh == {"tp": 2} else 64)
    return made


def outcome(request):
    """What a user sees of a request."""
    return [
        (o.token_ids, o.text, o.finish_reason, o.stop_reason, o.logprobs and [list(entry) for entry in o.logprobs])
        for o in request.outputs
    ]


@pytest.fixture(scope="module")
def alone(folder):
    """Each request by itself, one after another, on one device."""
    engine, found = engine_on(folder, {}, prefix_caching=False), []
    for ids, params in load():
        request = engine.submit(ids, params)
        engine.run()
        found.append(outcome(request))
    return found


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_tokens_are_the_same_among_others(folder, alone, mesh):
    """Requests arrive at random while others run; some are given up; the pool is so small that rows are preempted."""
    engine = engine_on(folder, mesh)
    rng, requests, dropped = random.Random(2), [], []
    for ids, params in load():
        requests.append(engine.submit(ids, params, stream=rng.random() < 0.3))
        if rng.random() < 0.3:
            dropped.append(engine.submit([5, 6, 7] * 20, SamplingParams(max_tokens=50, seed=1)))
        for _ in range(rng.randrange(4)):
            engine.step()
        if dropped and rng.random() < 0.5:
            engine.abort(dropped.pop())
    for request in dropped:
        engine.abort(request)
    engine.run()
    engine.check_integrity()
    assert [outcome(request) for request in requests] == alone
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.prefix_hits > 0
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)


def test_whoever_comes_does_not_wait_for_more_steps_than_patience_allows(folder, alone):
    """With patience the steps of a call are as many as fit into it: one at least, however slow they are."""
    engine = engine_on(folder, {})
    for patience, most in ((1e-9, 1), (1e9, CALL_STEPS)):
        engine.patience, counts = patience, []
        engine.on_land[:] = [lambda landing, counts=counts: counts.append(landing.steps)]
        requests = [engine.submit(ids, params, stream=False) for ids, params in itertools.islice(load(), 2)]
        engine.run()
        assert [outcome(request) for request in requests] == alone[:2]
        assert max(counts) <= most
        assert min(counts) == 1


@pytest.mark.parametrize("read", ["gather", "slab"])
def test_tokens_are_the_same_however_the_cache_is_read(folder, alone, read):
    engine = engine_on(folder, {"tp": 2}, read=read, cache_tokens=8 * 256)
    requests = [engine.submit(ids, params) for ids, params in load()]
    engine.run()
    assert [outcome(request) for request in requests] == alone


def test_every_step_is_compiled_ahead(folder, alone):
    """After the warm-up a mixed load compiles nothing: neither greedy texts alone, nor any, nor greedy ones after. As on GPUs:
    single steps are programs of their own, all are run once, and the host reads what loops made as soon as they end.
    """
    model, _ = programs_on(folder, (("tp", 2),))
    engine = engine_on(folder, {"tp": 2}, programs=Programs(model), max_num_seqs=8, max_num_batched_tokens=64)
    del engine.asked.wanted  # as it is, not everything
    engine.buckets = dataclasses.replace(engine.buckets, host_loops=True)
    engine.asked.levels, told = True, []
    engine.warm_up(lambda done, of: told.append((done, of)))
    assert told[-1][0] == told[-1][1] == 2 * len(list(engine.buckets.all(stops=4, biases=0)))
    before = engine.programs.compile_seconds
    rng, mixed = random.Random(3), [(ids, params) for ids, params in load() if not params.logit_bias]
    greedy = [(ids, SamplingParams(temperature=0, max_tokens=5)) for ids, _ in mixed[:4]]
    requests = []
    for part in (greedy, mixed, greedy):
        for ids, params in part:
            requests.append(engine.submit(ids, params, stream=rng.random() < 0.5))
            for _ in range(rng.randrange(3)):
                engine.step()
        engine.run()
    expected = [found for found, (_, params) in zip(alone, load(), strict=True) if not params.logit_bias]
    assert [outcome(request) for request in requests[4:-4]] == expected
    loops = {key[-1][0][1].loop for key in engine.programs._compiled if key[0].__name__ == "decode"}
    assert loops == {True, False}
    names = [key[0].__name__ for key in engine.programs._compiled]
    assert {*names} == {"begin", "decode", "mixed", "uncounted", "recount"}
    assert names.count("decode") + names.count("mixed") == told[-1][1]
    assert engine.programs.compile_seconds >= before  # of recount alone


def test_who_comes_while_a_cpu_is_at_prompts_goes_along_with_the_next_step(folder):
    """A step with prompts is read before another one is dispatched; rows alone are a step ahead of what is read."""
    engine, params = engine_on(folder, {}), SamplingParams(temperature=0, max_tokens=4)
    first = engine.submit([5, 6, 7], params)
    engine.step()
    assert len(first.sequences[0].ids) == 4
    second = engine.submit([5, 6, 8], params)
    engine.step()
    assert [len(request.sequences[0].ids) for request in (first, second)] == [5, 4]
    engine.step()
    assert [len(request.sequences[0].ids) for request in (first, second)] == [5, 4]
    engine.run()


def test_updates_join_to_the_text(folder):
    """What a listener is told, piece by piece, is the completion; it ends once."""
    engine, told = engine_on(folder, {}), {}
    requests = [
        engine.submit(ids, params, stream=True, listener=lambda request, updates: told.setdefault(request, []).extend(updates))
        for ids, params in load()
    ]
    engine.detokenizer.start()
    engine.run()
    engine.detokenizer.stop()
    for request in requests:
        for output in request.outputs:
            mine = [update for update in told[request] if update.index == output.index]
            assert "".join(update.text for update in mine) == output.text
            assert [token for update in mine for token in update.token_ids] == output.token_ids
            assert [update.finish_reason for update in mine] == [None] * (len(mine) - 1) + [output.finish_reason]
        assert request.arrived <= request.scheduled <= request.first_token <= request.finished_at


def test_what_is_given_up_is_told_and_leaves_nothing(folder):
    engine, told = engine_on(folder, {}), []
    request = engine.submit(
        [5, 6, 7], SamplingParams(n=2, max_tokens=40, seed=0), listener=lambda _, updates: told.extend(updates)
    )
    for _ in range(3):
        engine.step()
    engine.abort(request)
    engine.abort(request)
    assert [update.finish_reason for update in told if update.finish_reason] == ["abort", "abort"]
    engine.run()
    assert engine.stats().pages_used == 0
    assert request.finished


def test_what_can_never_run_is_refused(folder):
    engine = engine_on(folder, {})
    for ids, params, message in [
        ([3] * 256, SamplingParams(), "a prompt has 256 tokens, but max_model_len is 256"),
        ([], SamplingParams(), "a prompt has no tokens"),
        ([3, 4000], SamplingParams(), "outside the vocabulary of 128"),
        ([3], SamplingParams(top_k=4000), "top_k=4000 must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.submit(ids, params)
    assert not engine.step()


def test_the_engine_of_an_llm_serves_its_streams_and_calls(folder):
    """A stream that nobody reads to its end frees its rows; a call beside it gets its tokens."""
    llm = LLM(folder, progress=False, max_model_len=128)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected = llm.generate([[5, 6, 7]], params)[0].outputs[0].token_ids
    stream = llm.stream([[5, 6, 7]], params)
    next(stream)
    assert llm.generate([[5, 6, 7]], params)[0].outputs[0].token_ids == expected
    stream.close()
    assert llm.engine.stats().running == 0
