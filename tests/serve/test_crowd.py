"""A crowd of random requests: right ones, malformed ones, too many at once, clients that leave. Nothing is lost or stuck."""

import asyncio
import contextlib
import gc
import json
import random
import resource

import aiohttp
import fake_engine
import pytest
import serving

from jaxtp import CompletionOutput, SamplingParams
from jaxtp.engine.request import Request


def random_request(draw: random.Random) -> dict:
    request = {
        "prompt": "".join(draw.choices("abc defg", k=draw.randint(1, 60))),
        "max_tokens": draw.randint(1, 60),
        "seed": draw.randrange(1000),
        "n": draw.choice([1, 1, 1, 2, 4]),
    }
    for name, value in (
        ("temperature", draw.choice([0, 0.7, 2])),
        ("stop", draw.choice(["a", ["~", "}"], "xyz"])),
        ("ignore_eos", True),
        ("logprobs", draw.randint(0, 5)),
        ("return_token_ids", True),
        ("stream_options", {"include_usage": True}),
        ("min_tokens", 1),
    ):
        if draw.random() < 0.3:
            request[name] = value
    request["stream"] = "stream_options" in request or draw.random() < 0.5
    return request


def expected(request: dict) -> list[tuple[str, str]]:
    """(text, finish reason) of each completion."""
    given = {name: request[name] for name in ("max_tokens", "temperature", "n", "ignore_eos", "min_tokens") if name in request}
    params = SamplingParams(**given, stop=request.get("stop", ()), logprobs=request.get("logprobs"))
    ids, found = serving.tokenizer().encode(request["prompt"]), []
    for i in range(params.n):
        made = Request("", ids, params, outputs=[CompletionOutput(k, "", []) for k in range(params.n)])
        tokens = fake_engine.tokens_of(ids, params, i, request["seed"], 512 - len(ids))
        row = fake_engine.Row(made, i, tokens, serving.tokenizer())
        text = ""
        while row.output.finish_reason is None:
            text += row.advance().text
        found.append((text, row.output.finish_reason))
    return found


async def asked(client, request: dict) -> list[tuple[str, str]] | int:
    """What the server answers, in the form of `expected`, or the status."""
    async with client.post("/v1/completions", json=request) as answer:
        if answer.status != 200:
            return answer.status
        if request["stream"]:
            lines = [line[6:] async for line in answer.content if line.startswith(b"data: ")]
            assert lines[-1] == b"[DONE]\n"
            choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
        else:
            choices = (await answer.json())["choices"]
    texts, ends = [""] * request["n"], [""] * request["n"]
    for choice in choices:
        texts[choice["index"]] += choice["text"]
        ends[choice["index"]] = choice["finish_reason"] or ""
    return list(zip(texts, ends, strict=True))


async def one(client, seed: int, seen: dict, expected) -> None:
    """One client's request, and whether it got what it should."""
    draw = random.Random(seed)
    request = random_request(draw)
    await asyncio.sleep(draw.random() * 0.5)
    kind = draw.choices(["right", "leaves", "malformed", "wrong"], [6, 2, 1, 1])[0]
    if kind == "right":
        found = await asked(client, request)
        assert found == 429 or found == expected(request), (seed, request, found)
        kind = "full" if found == 429 else kind
    elif kind == "leaves":
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asked(client, {**request, "max_tokens": 400, "ignore_eos": True}), draw.random() * 0.3)
    elif kind == "malformed":
        body = bytearray(json.dumps(request).encode())
        body[draw.randrange(len(body))] = draw.randrange(256)
        headers = {"content-type": "application/json"}
        async with client.post("/v1/completions", data=bytes(body), headers=headers) as answer:
            assert answer.status in (200, 400, 404, 429), (seed, bytes(body), await answer.text())
    else:
        name = draw.choice([*request])
        wrong = {**request, name: draw.choice([None, {}, "?", -7, [[]], 10**40])}
        async with client.post("/v1/completions", json=wrong) as answer:
            assert answer.status in (200, 400, 429), (seed, name, await answer.text())
    seen[kind] = seen.get(kind, 0) + 1


async def crowd(url: str, seeds, expected=expected) -> dict:
    """What became of a client for each seed: kind -> how many."""
    seen: dict[str, int] = {}
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=64)) as client:
        await asyncio.gather(*(one(client, seed, seen, expected) for seed in seeds))
    return seen


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_crowd(count, request):
    gc.collect()
    gc.freeze()  # what other tests have left is not looked through each time
    request.addfinalizer(gc.unfreeze)
    engine = fake_engine.FakeEngine(serving.tokenizer(), rows=16, queued=24, seconds=0.001)
    with serving.serving(serving.served(engine)) as server:
        peaks = []
        for begin in range(0, count, 100):
            seen = asyncio.run(crowd(server.url, range(begin, begin + 100)))
            assert sum(seen.values()) == 100
            assert seen["right"] > 5
            serving.wait_for(lambda: not engine.running and not engine.waiting and not server.service.loop.open)
            gc.collect()
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        assert engine.aborted
        if count > 1000:
            assert peaks[-1] - peaks[len(peaks) // 2] < 20 * 1024  # KiB
