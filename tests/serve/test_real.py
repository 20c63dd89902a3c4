"""The engine itself behind the server: what clients are given is what `LLM.generate` makes, and nothing is left over."""

import asyncio
import json
import os
import random
import re
import threading

import openai
import pytest
import serving
import tiny
from test_crowd import crowd, random_request
from test_page import answered, chromium, say  # noqa: F401
from test_refusals import CHAT, ask

from jaxtp import LLM, SamplingParams
from jaxtp.serve.served import Served, defaults_of
from jaxtp.serve.settings import Settings

PROMPTS = ["Hello", "How are you", "Hello again", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny.checkpoint(tmp_path_factory.mktemp("model"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": serving.TEMPLATE}))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.0, "max_new_tokens": 9}))
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    made = LLM(folder, max_num_seqs=4, progress=False)
    # few programs: one step a call, and what a server's sampler has
    made.engine.asked.levels, made.engine.patience = True, 1e-9
    return made


@pytest.fixture(scope="module")
def wanted(folder, llm):
    """The texts that the library makes, before the engine serves."""
    params = [SamplingParams(temperature=0, max_tokens=12), SamplingParams(seed=5, max_tokens=12, n=2, logprobs=2)]
    return [llm.generate(PROMPTS, each) for each in params]


SEEDS = range(1000, 1000 + int(os.environ.get("CROWD", 24)))  # CROWD=2000: a minute


def key(request):
    return json.dumps(request, sort_keys=True)


@pytest.fixture(scope="module")
def offline(llm):
    """What the library makes of each request of the crowd: (text, why it ended) of its completions."""
    requests = [random_request(random.Random(seed)) for seed in SEEDS]
    told = [{k: v for k, v in request.items() if k in SamplingParams.__dataclass_fields__} for request in requests]
    params = [SamplingParams(**{"temperature": 0.0, **given}) for given in told]
    made = llm.generate([request["prompt"] for request in requests], params)
    return {
        key(request): [(output.text, output.finish_reason) for output in found.outputs]
        for request, found in zip(requests, made, strict=True)
    }


@pytest.fixture(scope="module")
def server(llm, wanted, offline):
    with serving.serving(Served.of(llm, Settings(served_model_name=("tiny",)))) as running:
        yield running


def idle(llm):
    serving.wait_for(lambda: not llm.engine.stats().running and not llm.engine.stats().waiting)
    llm.engine.check_integrity()


def test_whole_and_streamed_texts_are_those_of_the_library(server, llm, wanted):
    greedy, drawn = wanted
    assert "detokenizer" in {thread.name for thread in threading.enumerate()}

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def streamed(prompt):
                stream = await client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=12, stream=True)
                async with stream:
                    return "".join([chunk.choices[0].text async for chunk in stream])

            several = client.completions.create(
                model="tiny", prompt=PROMPTS, seed=5, temperature=1, max_tokens=12, n=2, logprobs=2
            )
            return await asyncio.gather(several, *map(streamed, PROMPTS))

    several, *texts = asyncio.run(ask_all())
    assert texts == [request.outputs[0].text for request in greedy]
    outputs = [output for request in drawn for output in request.outputs]
    assert [choice.text for choice in several.choices] == [output.text for output in outputs]
    for choice, output in zip(several.choices, outputs, strict=True):
        chosen = [found[token].logprob for token, found in zip(output.token_ids, output.logprobs, strict=True)]
        assert choice.logprobs.token_logprobs == pytest.approx(chosen, abs=1e-5)
    idle(llm)


def test_the_model_folders_wishes_come_before_openais_and_after_the_requests(server, llm, folder):
    assert defaults_of(str(folder)) == {"temperature": 0.0, "max_tokens": 9}
    plain = ask(server, "POST", "/v1/completions", {"prompt": "Hello", "ignore_eos": True})[2]
    assert plain["usage"]["completion_tokens"] == 9
    assert (
        plain["choices"][0]["text"]
        == ask(server, "POST", "/v1/completions", {"prompt": "Hello", "ignore_eos": True})[2]["choices"][0]["text"]
    )
    own = ask(server, "POST", "/v1/completions", {"prompt": "Hello", "ignore_eos": True, "max_tokens": 4})[2]
    assert own["usage"]["completion_tokens"] == 4
    assert ask(server, "POST", "/v1/chat/completions", {**CHAT, "ignore_eos": True})[2]["usage"]["completion_tokens"] == 9
    (folder / "bad").mkdir()
    (folder / "bad" / "generation_config.json").write_text('{"top_p": 7}')
    with pytest.raises(ValueError, match=r"bad/generation_config.json: top_p=7 must be in"):
        defaults_of(str(folder / "bad"))
    idle(llm)


def test_a_client_that_goes_away_leaves_no_page_behind(server, llm):
    steps, made = llm.engine.stats().steps, []
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        asked = {"model": "tiny", "max_tokens": 480, "extra_body": {"ignore_eos": True}}
        threads = [
            threading.Thread(target=lambda: made.append(ask(server, "POST", "/v1/completions", {"prompt": "others"})[0]))
        ]
        with client.completions.create(prompt="Hello", n=3, stream=True, **asked) as stream:
            next(iter(stream))
            threads[0].start()
    threads[0].join()
    assert made == [200]
    idle(llm)
    assert llm.engine.stats().pages_used == 0
    assert llm.engine.stats().steps - steps < 400


def test_a_crowd_gets_what_the_library_makes(server, llm, offline):
    """Some leave, some send nonsense; four rows, and many more than that at once."""
    seen = asyncio.run(crowd(server.url, SEEDS, lambda request: offline[key(request)]))
    assert sum(seen.values()) == len(SEEDS)
    assert seen["right"] > 9 / 24 * len(SEEDS)
    assert seen["leaves"] > 0.1 * len(SEEDS)
    serving.wait_for(lambda: not server.service.loop.open)
    idle(llm)
    assert llm.engine.stats().pages_used == 0


def test_the_chat_page_shows_what_the_library_makes(server, llm, chromium):  # noqa: F811
    """In a browser: an answer as it grows, a second one that knows the first, and one that is stopped on its way."""
    page = chromium.new_page()
    page.set_default_timeout(20_000)
    page.goto(server.url)
    page.fill("#temperature", "0")
    page.fill("#most", "12")
    messages = []
    for count, text in enumerate(("Hello", "How are you"), 1):
        messages.append({"role": "user", "content": text})
        body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 12}
        wanted = ask(server, "POST", "/v1/chat/completions", body)[2]["choices"][0]["message"]["content"]
        say(page, text)
        assert answered(page, count).last.locator(".text").text_content() == wanted
        messages.append({"role": "assistant", "content": wanted})
    page.fill("#most", "400")
    say(page, "x")
    page.locator(".growing .text").filter(has_text=re.compile(".")).wait_for()
    page.keyboard.press("Escape")
    answered(page, 3)
    page.close()
    idle(llm)


def test_what_the_engine_refuses_is_a_400(server):
    status, _, body = ask(server, "POST", "/v1/completions", {"prompt": "Hello", "top_k": 1000})
    assert (status, body["error"]["param"]) == (400, "top_k")
    assert "top_k=1000 must be at most 128" in body["error"]["message"]
    status, _, body = ask(server, "POST", "/v1/completions", {"prompt": [500]})
    assert (status, body["error"]["param"]) == (400, "prompt")
