"""The official client, against the server over HTTP: what it is given is what the engine made."""

import asyncio

import fake_engine
import openai
import pytest
import serving

from jaxtp import SamplingParams

engine, server = serving.engine, serving.server
MESSAGES = [{"role": "user", "content": "Hi there"}]


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def chunks_of(stream):
    """All of them, the connection left in order."""
    with stream:
        return list(stream)


def expected(prompt, *, index=0, seed=0, **params):
    """The tokens and the text of a completion, made without a server."""
    tokenizer = serving.tokenizer()
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    tokens = fake_engine.tokens_of(ids, SamplingParams(**params), index, seed, 512 - len(ids))
    return tokens, tokenizer.decode(tokens)


def test_completions(client):
    done = client.completions.create(model="tiny", prompt="Hello", temperature=0)
    tokens, text = expected("Hello", temperature=0)
    assert done.object == "text_completion"
    assert done.id.startswith("cmpl-")
    assert done.model == "tiny"
    assert (done.choices[0].text, done.choices[0].finish_reason, done.choices[0].index) == (text, "length", 0)
    assert done.choices[0].stop_reason is None
    usage = done.usage.model_dump()
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5, 16, 21)
    assert len(tokens) == 16  # OpenAI's default


def test_every_form_of_a_prompt(client):
    ids = serving.tokenizer().encode("Hello")
    alone = client.completions.create(model="tiny", prompt="Hello", temperature=0).choices[0].text
    assert client.completions.create(model="tiny", prompt=ids, temperature=0).choices[0].text == alone
    for several in (["Hello", "You"], [ids, serving.tokenizer().encode("You")]):
        done = client.completions.create(model="tiny", prompt=several, temperature=0, n=1)
        assert [choice.text for choice in done.choices] == [alone, expected("You", temperature=0)[1]]
        assert [choice.index for choice in done.choices] == [0, 1]
        assert done.usage.prompt_tokens == 8


def test_n_completions_of_several_prompts_are_numbered_through(client):
    done = client.completions.create(model="tiny", prompt=["Hello", "You"], n=2, seed=7)
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    wanted = [expected(prompt, index=i, seed=7)[1] for prompt in ("Hello", "You") for i in range(2)]
    assert [choice.text for choice in done.choices] == wanted
    assert len(set(wanted)) == 4


def test_a_stream_of_completions(client):
    whole = client.completions.create(model="tiny", prompt="Hello", n=2, seed=3, max_tokens=30)
    chunks = chunks_of(client.completions.create(model="tiny", prompt="Hello", n=2, seed=3, max_tokens=30, stream=True))
    for i in range(2):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == i]
        assert "".join(choice.text for choice in mine) == whole.choices[i].text
        assert [choice.finish_reason for choice in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == whole.choices[i].finish_reason
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_chat_whole_and_streamed(client):
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_completion_tokens=20)
    _, text = expected("user: Hi there assistant: ", temperature=0, max_tokens=20)
    assert (whole.object, whole.choices[0].message.role) == ("chat.completion", "assistant")
    assert whole.choices[0].message.content == text
    chunks = chunks_of(
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            temperature=0,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert [chunk.choices[0].delta.role for chunk in chunks[1:-1]] == [None] * (len(chunks) - 2)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_chat_goes_to_the_end_of_the_context_by_default(client):
    done = client.chat.completions.create(model="tiny", messages=MESSAGES, seed=1, extra_body={"ignore_eos": True})
    assert done.usage.total_tokens == 512
    assert done.choices[0].finish_reason == "length"


def test_usage_in_every_chunk(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = chunks_of(
        client.completions.create(
            model="tiny", prompt="Hello", temperature=0, max_tokens=5, stream=True, stream_options=options
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 5
    assert chunks[-1].choices == []


def test_cached_tokens_are_told(client):
    ids = [5] * 40
    first, second = (client.completions.create(model="tiny", prompt=ids, max_tokens=1).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens == 32


def test_echo_and_what_vllm_has_beside_openai(client):
    more = {
        "return_token_ids": True,
        "truncate_prompt_tokens": 3,
        "request_id": "mine",
        "min_tokens": 2,
        "top_k": 5,
        "min_p": 0.1,
    }
    for stream in (False, True):
        done = client.completions.create(
            model="tiny", prompt="Hello", temperature=0, echo=True, max_tokens=9, stream=stream, extra_body=more
        )
        choices = [chunk.choices[0] for chunk in chunks_of(done)] if stream else [done.choices[0]]
        tokens, text = expected("llo", temperature=0, max_tokens=9, min_tokens=2)
        assert "".join(choice.text for choice in choices) == "llo" + text
        assert [token for choice in choices for token in choice.token_ids] == tokens
        assert choices[0].prompt_token_ids == serving.tokenizer().encode("llo")
    assert (
        client.completions.create(model="tiny", prompt="x", max_tokens=1, extra_body={"request_id": "mine"}).id == "cmpl-mine"
    )


def test_stops(client):
    text = expected("Hello", temperature=0, max_tokens=40, ignore_eos=True)[1]
    stop = text[10:13]
    asked = {"model": "tiny", "prompt": "Hello", "temperature": 0, "max_tokens": 40}
    done = client.completions.create(**asked, stop=stop, extra_body={"ignore_eos": True})
    assert (done.choices[0].text, done.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    assert done.choices[0].stop_reason == stop
    shown = client.completions.create(
        **asked, stop=[stop, "~~~"], extra_body={"ignore_eos": True, "include_stop_str_in_output": True}
    )
    assert shown.choices[0].text == text[: text.index(stop)] + stop
    token = expected("Hello", temperature=0, max_tokens=40, ignore_eos=True)[0][4]
    by_id = client.completions.create(**asked, extra_body={"ignore_eos": True, "stop_token_ids": [token]})
    assert by_id.choices[0].stop_reason == token


def test_logprobs_of_completions(client):
    done = client.completions.create(model="tiny", prompt="Hello", temperature=0, logprobs=2, max_tokens=6)
    tokens, text = expected("Hello", temperature=0, max_tokens=6)
    found = done.choices[0].logprobs
    names = [serving.tokenizer().decode([token]) for token in tokens]
    assert found.tokens == names
    assert found.token_logprobs == [-0.5] * 6
    assert found.text_offset == list(range(6))
    assert [len(top) for top in found.top_logprobs] == [2] * 6
    assert found.top_logprobs[0][names[0]] == -0.5
    chunks = chunks_of(
        client.completions.create(model="tiny", prompt="Hello", temperature=0, logprobs=2, max_tokens=6, stream=True)
    )
    assert [offset for chunk in chunks for offset in chunk.choices[0].logprobs.text_offset] == found.text_offset
    assert "".join(chunk.choices[0].text for chunk in chunks) == text


def test_logprobs_of_a_chat(client):
    done = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, logprobs=True, top_logprobs=3, max_tokens=4
    )
    content = done.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == done.choices[0].message.content
    assert [entry.bytes for entry in content] == [list(entry.token.encode()) for entry in content]
    assert [[top.logprob for top in entry.top_logprobs] for entry in content] == [[-0.5, -1.5, -2.5]] * 4
    assert all(entry.top_logprobs[0].token == entry.token for entry in content)
    none = client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, max_tokens=1)
    assert none.choices[0].logprobs.content[0].top_logprobs == []
    assert client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1).choices[0].logprobs is None


def test_conversations_in_parts_and_continued(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]}]
    whole = client.chat.completions.create(
        model="tiny", messages=parts, temperature=0, max_tokens=5, extra_body={"return_token_ids": True}
    )
    assert whole.prompt_token_ids == serving.tokenizer().encode("user: Hi\nthere assistant: ")
    more = {"continue_final_message": True, "return_token_ids": True}
    messages = [*MESSAGES, {"role": "assistant", "content": "Well,"}]
    done = client.chat.completions.create(model="tiny", messages=messages, max_tokens=5, extra_body=more)
    assert done.prompt_token_ids == serving.tokenizer().encode("user: Hi there assistant: Well,")
    loud = {"chat_template_kwargs": {"shout": True}, "add_generation_prompt": False, "return_token_ids": True}
    done = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5, extra_body=loud)
    assert done.prompt_token_ids == serving.tokenizer().encode("user: Hi there LOUD")


def test_models(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == 512
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here; there is tiny"):
        client.models.retrieve("other")


def test_many_at_once_with_the_asynchronous_client(server, engine):
    async def ask(client, i):
        stream = await client.completions.create(
            model="tiny", prompt=f"Prompt {i}", seed=i, max_tokens=20 + i, stream=True, extra_body={"ignore_eos": True}
        )
        async with stream:
            return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, i) for i in range(40)))

    found = asyncio.run(all_of_them())
    assert found == [expected(f"Prompt {i}", seed=i, max_tokens=20 + i, ignore_eos=True)[1] for i in range(40)]
    assert engine.stats().generation_tokens == sum(20 + i for i in range(40))
