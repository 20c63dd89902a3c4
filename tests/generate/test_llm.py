"""LLM: what requests ask for is what they get, on every mesh and in every batch; nothing compiles twice."""

import dataclasses
import inspect
import itertools

import jax
import numpy as np
import pytest
import tiny

from jaxtp import LLM, Llama, SamplingParams, buckets, make_mesh

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(folder):
    return tiny.coarse(LLM(folder, progress=False))


def tokens(requests):
    return [[output.token_ids for output in request.outputs] for request in requests]


def one(llm, prompt, **params):
    return llm.generate(prompt, SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True, **params}))[
        0
    ].outputs[0]


# -- the forward behind it -----------------------------------------------------------------------------------------------


def naive(llm: LLM, prompt: list[int], new: int) -> list[int]:
    """Greedy tokens without any cache: the whole text again for each."""
    ids = list(prompt)
    for _ in range(new):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(np.asarray(llm.model(padded))[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


def test_cached_decoding_equals_recomputing_everything(llm):
    for prompt in tiny.prompts(3, longest=40):
        assert one(llm, prompt).token_ids == naive(llm, prompt, 12)


def test_prompts_that_wait_for_room_in_a_step_get_the_same_tokens(folder, llm):
    """A chunk of a prompt at a time, beside the rows whose prompts are done."""
    prompts = tiny.prompts(5, longest=300, seed=1)
    chunked = tiny.coarse(LLM(folder, progress=False, max_num_batched_tokens=32))
    assert tokens(chunked.generate(prompts, GREEDY)) == tokens(llm.generate(prompts, GREEDY))


def test_pages_are_added_without_a_trace_in_the_text(llm):
    long = one(llm, [5, 6, 7], max_tokens=300).token_ids
    assert len(long) == 300  # five pages
    again = one(llm, [5, 6, 7, *long[:140]], max_tokens=160).token_ids
    assert again == long[140:]


@pytest.mark.parametrize(
    "mesh",
    [
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 8},
        {"data_parallel_size": 8},
        {"data_parallel_size": 2, "tensor_parallel_size": 4, "sequence_parallel": True},
    ],
    ids=str,
)
def test_the_same_text_on_every_mesh(folder, llm, mesh):
    params = [
        SamplingParams(temperature=t, top_p=0.95, top_k=40, seed=11, n=2, max_tokens=20) for t in (0.0, 1.0, 1.0, 0.0, 1.0)
    ]
    prompts = tiny.prompts(5, longest=50, seed=2)
    other = tiny.coarse(LLM(folder, progress=False, **mesh))
    assert tokens(other.generate(prompts, params)) == tokens(llm.generate(prompts, params))


def test_a_seed_gives_the_same_text_alone_and_in_a_batch(llm):
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=16, n=2)
    prompts = tiny.prompts(4, longest=30, seed=3)
    alone = [llm.generate(prompt, params)[0] for prompt in prompts]
    assert tokens(llm.generate(prompts, params)) == tokens(alone)
    first, second = alone[0].outputs
    assert first.token_ids != second.token_ids  # the samples of a request differ


def test_requests_without_a_seed_differ_and_the_llm_s_seed_repeats_them(folder):
    params = SamplingParams(temperature=1.0, max_tokens=16)
    first, again, other = (LLM(folder, progress=False, seed=seed) for seed in (1, 1, 2))
    runs = [tokens(x.generate([[5], [5]], params)) for x in (first, again, other)]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]


def test_the_kv_cache_bounds_what_runs_and_the_order_is_kept(folder, llm):
    prompts = tiny.prompts(7, longest=60, seed=4)
    cache = 300 * llm.budget.slot_bytes
    few = tiny.coarse(LLM(folder, progress=False, max_num_seqs=3, max_model_len=256, kv_cache_memory_bytes=cache))
    assert tokens(few.generate(prompts, GREEDY)) == tokens(llm.generate(prompts, GREEDY))
    assert (few.engine.limits.rows, few.engine.limits.pages) == (3, 4)


# -- compiled once -------------------------------------------------------------------------------------------------------


@pytest.fixture
def compilations(monkeypatch):
    """Counts what XLA compiles, by JAX's own events."""
    seen = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.clear_event_listeners()


def test_a_second_call_with_the_same_buckets_compiles_nothing(folder, compilations):
    llm = LLM(folder, progress=False, tensor_parallel_size=2)
    params = SamplingParams(temperature=0.7, top_k=5, max_tokens=20, seed=0)
    llm.generate([[5, 6, 7], [8] * 20], params)
    before = len(compilations)
    assert before > 0
    llm.generate([[9] * 11, [4, 5]], params)
    list(llm.stream([[9] * 7, [4, 5, 6]], params))
    assert len(compilations) == before


def test_buckets_waste_at_most_a_fifth():
    for size in range(1, 5000):
        found = buckets.bucket(size, least=128)
        assert size <= found
        assert found <= max(128, size * 1.25)
    assert len({buckets.bucket(size, least=128) for size in range(1, 4097)}) == 21


# -- how requests end ----------------------------------------------------------------------------------------------------


def test_max_tokens_and_the_end_of_sequence(llm):
    output = one(llm, [5, 6, 7], max_tokens=9)
    assert (len(output.token_ids), output.finish_reason, output.stop_reason) == (9, "length", None)
    eos = output.token_ids[4]
    llm_eos, llm.engine.eos = llm.engine.eos, (eos,)
    try:
        ended = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=9))[0].outputs[0]
        first = output.token_ids.index(eos) + 1
        assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == (output.token_ids[:first], "stop", None)
        assert one(llm, [5, 6, 7], max_tokens=9).token_ids == output.token_ids  # ignore_eos
        late = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=9, min_tokens=7))[0].outputs[0]
        assert len(late.token_ids) >= 7
        assert eos not in late.token_ids[:6]
    finally:
        llm.engine.eos = llm_eos


def test_stop_token_ids(llm):
    free = one(llm, [5, 6, 7])
    stop = free.token_ids[3]
    output = one(llm, [5, 6, 7], stop_token_ids=[stop])
    first = free.token_ids.index(stop)
    assert output.token_ids == free.token_ids[: first + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.text == llm.tokenizer.decode(free.token_ids[:first])


def test_stop_strings_across_token_borders(llm):
    free = one(llm, "abc", max_tokens=40)
    for start, length in ((3, 1), (5, 4), (17, 7)):
        stop = free.text[start : start + length]
        first = free.text.index(stop)
        output = one(llm, "abc", max_tokens=40, stop=["never in there", stop])
        assert (output.text, output.finish_reason, output.stop_reason) == (free.text[:first], "stop", stop)
        needed = next(n for n in range(41) if stop in llm.tokenizer.decode(free.token_ids[:n]))
        assert output.token_ids == free.token_ids[:needed]
        with_it = one(llm, "abc", max_tokens=40, stop=stop, include_stop_str_in_output=True)
        assert with_it.text == free.text[: first + length]


def test_rows_of_a_batch_end_on_their_own(llm):
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 30, 7, 70)]
    found = llm.generate([[5, 6], [7], [8, 9, 10], [11]], params)
    assert [len(request.outputs[0].token_ids) for request in found] == [1, 30, 7, 70]
    assert all(request.finished for request in found)


def test_max_tokens_none_fills_the_model(folder):
    llm = LLM(folder, progress=False, max_model_len=40)
    output = llm.generate([[5] * 10], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))[0].outputs[0]
    assert len(output.token_ids) == 30


# -- what sampling parameters do -----------------------------------------------------------------------------------------


def test_every_parameter_reaches_its_row(llm):
    """Each parameter changes its own row and leaves the greedy rows beside it alone."""
    plain = one(llm, [5, 6, 7], max_tokens=24).token_ids
    forced = plain[0]
    changes = [
        {"repetition_penalty": 1.8},
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"logit_bias": {forced: -100.0}},
        {"temperature": 1.5, "seed": 3},
        {"temperature": 1.5, "seed": 3, "top_k": 2},
        {"temperature": 1.5, "seed": 3, "top_p": 0.3},
        {"temperature": 1.5, "seed": 3, "min_p": 0.5},
    ]
    base = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}
    params = [SamplingParams(**base)] + [SamplingParams(**{**base, **change}) for change in changes] + [SamplingParams(**base)]
    found = [request.outputs[0].token_ids for request in llm.generate([[5, 6, 7]] * len(params), params)]
    assert found[0] == found[-1] == plain
    changed = found[1:-1]
    assert all(ids != plain for ids in changed)
    assert all(ids != changed[4] for ids in changed[5:])  # the same seed, with a filter
    assert forced not in found[4]


def test_repetition_penalty_equals_transformers_formula(llm):
    ids = [5, 6, 7]
    for _ in range(10):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.array(llm.model(padded))[0, len(ids) - 1]
        seen = sorted(set(ids))
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.7, logits[seen] * 1.7)
        ids.append(int(logits.argmax()))
    assert one(llm, [5, 6, 7], repetition_penalty=1.7, max_tokens=10).token_ids == ids[3:]


def test_logprobs(llm):
    output = one(llm, [5, 6, 7], logprobs=3, max_tokens=4)
    padded = np.zeros((1, 32), np.int32)
    padded[0, :7] = [5, 6, 7, *output.token_ids]
    logits = np.asarray(llm.model(padded))[0].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    assert len(output.logprobs) == 4
    for i, (token, entries) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        best = np.argsort(-expected[2 + i])[:3]
        assert set(entries) == {token, *best.tolist()}
        for rank, other in enumerate(best.tolist()):
            assert entries[other].rank == rank + 1
            assert entries[other].logprob == pytest.approx(expected[2 + i, other], abs=1e-4)
            assert entries[other].decoded_token == llm.tokenizer.decode([other], skip_special_tokens=False)
    sampled = one(llm, [5, 6, 7], logprobs=0, temperature=1.0, seed=1, max_tokens=3)
    assert [set(entries) for entries in sampled.logprobs] == [{token} for token in sampled.token_ids]


# -- streaming and chat --------------------------------------------------------------------------------------------------


def test_a_stream_gives_the_same_text_token_by_token(llm):
    params = SamplingParams(temperature=0, max_tokens=10, stop=["~~~"])
    whole = llm.generate(["Hello", "How"], params)
    seen: dict[int, list[str]] = {}
    for request in llm.stream(["Hello", "How"], params):
        seen.setdefault(request.request_id, []).append(request.outputs[0].text)
    assert [texts[-1] for texts in seen.values()] == [request.outputs[0].text for request in whole]
    for texts in seen.values():
        assert len(texts) == 10
        assert all(b.startswith(a) for a, b in itertools.pairwise(texts))


def test_chat_without_a_template_is_refused(llm):
    with pytest.raises(ValueError, match="has no chat template; give a prompt to generate"):
        llm.chat([{"role": "user", "content": "Hello"}])


def test_chat_uses_the_model_s_template(folder, llm):
    llm = LLM(folder, progress=False)
    llm.tokenizer.templates["default"] = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    messages = [{"role": "user", "content": "Hi"}]
    expected = llm.generate([llm.tokenizer.encode("[user] Hi\n[assistant] ", add_special_tokens=False)], GREEDY)
    assert tokens(llm.chat(messages, GREEDY)) == tokens(expected)
    assert tokens(llm.chat([messages, messages], GREEDY)) == tokens(expected) * 2


# -- mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be at least 0"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_p": 1.01}, r"top_p=1.01 must be in \(0, 1\]"),
        ({"top_k": -2}, "top_k=-2 must be at least 1, or 0 or -1"),
        ({"min_p": 2.0}, r"min_p=2.0 must be in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be above 0"),
        ({"presence_penalty": 3.0}, r"presence_penalty=3.0 must be in \[-2, 2\]"),
        ({"frequency_penalty": -3.0}, r"frequency_penalty=-3.0 must be in"),
        ({"logit_bias": {3: 101.0}}, r"logit_bias\[3\]=101.0 must be in"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1 or None"),
        ({"max_tokens": 4, "min_tokens": 5}, r"min_tokens=5 must be in \[0, max_tokens=4\]"),
        ({"n": 0}, "n=0 must be at least 1"),
        ({"logprobs": -1}, "logprobs=-1 must be in"),
        ({"stop": [""]}, "stop holds an empty string"),
        ({"seed": -1}, "seed=-1 must be in"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


@pytest.mark.parametrize("stop", [5, ["a", 5], {"a": 1}])
def test_a_stop_list_of_the_wrong_type(stop):
    with pytest.raises(TypeError, match="must be a string or a list of strings"):
        SamplingParams(stop=stop)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "the batch is empty"),
        ([[]], "a prompt has no tokens"),
        ([[5] * 512], "a prompt has 512 tokens, but max_model_len is 512"),
        ([[5, 128]], r"a prompt has token ids \[128\], outside the vocabulary of 128"),
        ([""], "a prompt has no tokens; an empty text needs a tokenizer that adds"),
    ],
)
def test_prompts_that_cannot_be(llm, prompts, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, GREEDY)


@pytest.mark.parametrize("settings", [{"logit_bias": {-1: 3.0}}, {"logit_bias": {128: 3.0}}, {"stop_token_ids": [5, 999]}])
def test_ids_that_the_vocabulary_lacks(llm, settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} has token ids .*, outside the vocabulary of 128"):
        llm.generate([[5]], SamplingParams(**settings))


def test_as_many_parameters_as_prompts(llm):
    with pytest.raises(ValueError, match="2 prompts but 3 sampling parameters"):
        llm.generate([[5], [6]], [GREEDY] * 3)


def test_text_without_a_tokenizer(tmp_path):
    llm = LLM(tiny.checkpoint(tmp_path / "bare", tokenizer=False), progress=False)
    with pytest.raises(ValueError, match="has no tokenizer: give token ids"):
        llm.generate("text", GREEDY)
    assert llm.generate([[5, 6]], GREEDY)[0].outputs[0].text == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_model_len": 513}, "max_model_len=513 exceeds the model's max_position_embeddings=512"),
        ({"max_model_len": 1}, "max_model_len=1 must be in"),
        ({"gpu_memory_utilization": 1.5}, r"gpu_memory_utilization=1.5 must be in \(0, 1\]"),
        ({"load_format": "pickle"}, "load_format='pickle' must be"),
        ({"tensor_parallel_size": 16}, "tp=16 does not divide 8 query heads"),
        ({"data_parallel_size": 16}, "dp=16 needs 16 devices, 8 are there"),
        ({"dtype": "float64"}, "dtype='float64' is not supported; supported: float32, bfloat16, float16"),
        ({"kernel": "flash"}, "kernel='flash' is none of reference, xla, cudnn"),
        ({"kernel": "cudnn"}, "kernel='cudnn' needs GPUs"),
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be at least 1"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0 must be at least 1"),
    ],
)
def test_arguments_that_cannot_be(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        LLM(folder, progress=False, **arguments)


# -- weights without a checkpoint ----------------------------------------------------------------------------------------


def test_dummy_weights(folder, monkeypatch):
    from jaxtp import presets

    monkeypatch.setitem(presets.PRESETS, "tiny", tiny.config())
    llm = LLM("tiny", load_format="dummy", tensor_parallel_size=2, progress=False)
    assert len(llm.generate([[5, 6]], SamplingParams(max_tokens=5, ignore_eos=True))[0].outputs[0].token_ids) == 5
    assert LLM(folder, load_format="dummy", progress=False).config == tiny.config(dtype="float32")


def test_a_start_is_reported_as_it_is(folder, caplog):
    with caplog.at_level("INFO", logger="jaxtp"):
        llm = LLM(folder, progress=False, tensor_parallel_size=2, data_parallel_size=2)
        llm.generate([[5, 6, 7]], GREEDY)
    text = caplog.text
    assert "on dp=2 × tp=2" in text
    assert f"KV cache: {llm.cache_tokens:,} tokens" in text
    assert "maximum concurrency at 512 tokens a request" in text
    assert "ms/token" in text
    assert "GB/s read by each device" in text
    weights = sum(a.addressable_shards[0].data.nbytes for a in llm.programs._leaves)
    assert llm.budget.weight_bytes == weights


def test_the_command_line_has_the_arguments_of_the_library():
    from jaxtp.cli import options as cli

    def fields(cls, *left_out):
        return {f.name: f.default for f in dataclasses.fields(cls) if f.name not in left_out}

    llm = {name: p.default for name, p in inspect.signature(LLM).parameters.items() if name not in ("model", "progress")}
    assert fields(cli.Engine, "virtual_devices", "no_compilation_cache") == llm  # those are of the process
    sampling = {f.name for f in dataclasses.fields(SamplingParams)}
    command = set(fields(cli.Sampling)) - {"request_seed"} | {"seed"}
    assert sampling - command == {"logit_bias", "include_stop_str_in_output", "skip_special_tokens"}
    assert command <= sampling


def test_the_model_itself_is_callable_with_a_cache(llm):
    ids = np.array([[5, 6, 7, 8], [9, 10, 11, 12]], np.int32)
    whole = np.asarray(llm.model(ids))
    cache = llm.programs.run(lambda model: model.empty_cache(pages=2, slots=16).zeros())
    first, cache = llm.model(ids[:, :3], cache=cache)
    second, cache = llm.model(ids[:, 3:], positions=np.array([[3], [3]], np.int32), cache=cache)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, atol=1e-5)


def test_segments_do_not_see_one_another(llm):
    import jax.numpy as jnp

    packed = np.array([[5, 6, 7, 9, 10]], np.int32)
    positions, segments = jnp.array([[0, 1, 2, 0, 1]], jnp.int32), jnp.array([[1, 1, 1, 2, 2]], jnp.int32)
    for mesh in ({}, {"tp": 4}):
        model = Llama.from_pretrained(llm.model.source, mesh=make_mesh(**mesh), progress=False)
        found = np.asarray(model(packed, positions, segments))
        np.testing.assert_allclose(found[:, :3], np.asarray(model(packed[:, :3])), atol=1e-5)
        np.testing.assert_allclose(found[:, 3:], np.asarray(model(packed[:, 3:])), atol=1e-5)


def test_a_growing_text_never_shows_part_of_a_stop_string(llm):
    whole = one(llm, [5, 6, 7], max_tokens=40).text
    stop = whole[10:14]
    params = SamplingParams(temperature=0, max_tokens=40, stop=[stop])
    final = llm.generate([[5, 6, 7]], params)[0].outputs[0].text
    assert final == whole[: whole.index(stop)]
    seen = [request.outputs[0].text for request in llm.stream([[5, 6, 7]], params)]
    assert seen[-1] == final
    assert all(final.startswith(text) for text in seen)


def test_a_stop_string_before_min_tokens_does_not_count(llm):
    whole = one(llm, [5, 6, 7], max_tokens=40)
    early = whole.text[3:5]
    found = one(llm, [5, 6, 7], max_tokens=40, min_tokens=20, stop=[early])
    again = whole.text.find(early, 20 - len(early) + 1)
    assert len(found.token_ids) >= 20
    assert found.text == (whole.text[:again] if again >= 0 else whole.text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 2.5}, "max_tokens=2.5 must be an int or None"),
        ({"top_k": 2.5}, "top_k=2.5 must be an int"),
        ({"seed": 1.5}, "seed=1.5 must be an int or None"),
        ({"temperature": "0.5"}, "temperature='0.5' must be a number"),
        ({"stop_token_ids": ["a"]}, "must be a list of ints"),
    ],
)
def test_settings_of_the_wrong_type(settings, message):
    with pytest.raises(TypeError, match=message):
        SamplingParams(**settings)


def test_prompts_as_vllm_takes_them(llm):
    expected = one(llm, [5, 6, 7], max_tokens=4).token_ids
    params = SamplingParams(temperature=0, max_tokens=4)
    for prompts in (
        {"prompt_token_ids": [5, 6, 7]},
        [{"prompt_token_ids": [5, 6, 7]}],
        np.array([5, 6, 7]),
        [np.array([5, 6, 7])],
    ):
        assert llm.generate(prompts, sampling_params=params)[0].outputs[0].token_ids == expected
    with pytest.raises(TypeError, match=r"token ids are ints; given: 1\.7"):
        llm.generate([[1.7, 2.2]], params)
    with pytest.raises(TypeError, match='a dict with "prompt" or "prompt_token_ids"'):
        llm.generate({"text": "x"}, params)


def test_a_model_that_is_loaded(folder, llm):
    model = Llama.from_pretrained(folder, mesh=make_mesh(tp=2), progress=False)
    other = LLM(model, progress=False)
    assert one(other, [5, 6, 7], max_tokens=8).text == one(llm, [5, 6, 7], max_tokens=8).text


def test_overrides_hold_for_presets_and_for_the_end_of_a_text(folder, llm):
    first = one(llm, [5, 6, 7], max_tokens=8).token_ids
    ended = LLM(folder, hf_overrides={"eos_token_id": first[3]}, progress=False)
    made = ended.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=8))[0].outputs[0]
    assert (made.token_ids, made.finish_reason) == (first[: first.index(first[3]) + 1], "stop")
    small = {"num_hidden_layers": 1, "vocab_size": 256, "intermediate_size": 64, "hidden_size": 64, "head_dim": 2}
    made = LLM("llama-3.2-1b", load_format="dummy", hf_overrides=small, progress=False, max_model_len=128)
    assert made.config.num_layers == 1
    with pytest.raises(ValueError, match="settings that jaxtp does not know: bogus=1"):
        LLM("llama-3.2-1b", load_format="dummy", hf_overrides={**small, "bogus": 1}, progress=False)
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint folder llama-9.*presets: llama-2-7b"):
        LLM("llama-9", load_format="dummy", progress=False)


def test_axes_over_which_nothing_is_split():
    with pytest.raises(ValueError, match="the mesh has pp=2, over which these rules split nothing"):
        Llama(tiny.config(), mesh=make_mesh(pp=2, tp=4))


def test_tokens_of_another_shape(folder):
    model = Llama.from_pretrained(folder, mesh=make_mesh(dp=2), progress=False)
    for tokens in ([1, 2], [[1, 2]]):
        with pytest.raises(ValueError, match=r"must be \[B, T\], and B a multiple of dp=2"):
            model(tokens)
    assert model([[1, 2], [3, 4]]).shape == (2, 2, 128)
