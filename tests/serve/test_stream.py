"""What waits to be taken is put together, in order, whoever reads when."""

import asyncio

import pytest

from jaxtp.engine.outputs import Logprob
from jaxtp.engine.request import Update
from jaxtp.serve.stream import EngineFailed, Stream


def update(i, text, *, end=None, logprobs=False):
    return Update(i, text, [len(text)], [{len(text): Logprob(-1.0, 1)}] if logprobs else None, end, None)


def test_updates_that_wait_come_as_one_for_each_completion():
    async def run():
        stream = Stream(2, eager=True)
        stream.put(0, [update(0, "a", logprobs=True), update(1, "x")])
        assert await stream.take() == [((0, 0), update(0, "a", logprobs=True)), ((0, 1), update(1, "x"))]
        for text in ("b", "cc", "ddd"):
            stream.put(0, [update(0, text, logprobs=True)])
        stream.put(0, [update(1, "y", end="stop")])
        logprobs = [{i: Logprob(-1.0, 1)} for i in (1, 2, 3)]
        assert await stream.take() == [
            ((0, 0), Update(0, "bccddd", [1, 2, 3], logprobs)),
            ((0, 1), update(1, "y", end="stop")),
        ]
        assert not stream.ended
        stream.put(0, [update(0, "", end="abort")])
        assert not stream.ended
        await stream.take()
        assert stream.ended

    asyncio.run(run())


def test_who_wants_all_is_not_woken_before():
    async def run():
        stream = Stream(2, eager=False)
        taking = asyncio.ensure_future(stream.take())
        stream.put(0, [update(0, "a"), update(0, "b", end="stop")])
        await asyncio.sleep(0)
        assert not taking.done()
        stream.put(1, [update(0, "c", end="length")])
        assert [(place, found.text) for place, found in await taking] == [((0, 0), "ab"), ((1, 0), "c")]

    asyncio.run(run())


def test_a_failure_reaches_who_waits_and_who_comes_later():
    async def run():
        for waits in (True, False):
            stream = Stream(1, eager=False)
            taking = asyncio.ensure_future(stream.take())
            if waits:
                await asyncio.sleep(0)
            stream.fail(EngineFailed("gone"))
            with pytest.raises(EngineFailed, match="gone"):
                await taking

    asyncio.run(run())
