"""Load on a server whose behaviour is known: what is sent, when, how it is timed, and what goes wrong."""

import asyncio
import math
import subprocess
import sys
import time

import numpy as np
import pytest
from fake import PIECES, serving

from jaxtp.checkpoint.hf import DEMO
from jaxtp.load import Endpoint, Lengths, Level, Prompt, TextPrompts, TokenPrompts, arrivals, measure
from jaxtp.text import Tokenizer

SOURCE = TokenPrompts(Lengths(4, 12), Lengths(3, 9))


class Hi:
    """The same prompt, always."""

    def draw(self, rng, count):
        return [Prompt("Hi", 4, 6)] * count


def run(fake, *levels, source=SOURCE, seed=0, **endpoint):
    return measure(Endpoint(fake.url, **endpoint), source, levels, seed=seed, progress=False).levels


def ask(fake, count=1, source=TokenPrompts(Lengths(4), Lengths(6)), **endpoint):
    """The answers to requests one by one."""
    asked = Endpoint(fake.url, **endpoint)

    async def answers():
        async with asked.session() as session:
            return [await asked.ask(session, p, "tiny") for p in source.draw(np.random.default_rng(0), count)]

    return asyncio.run(answers())


def test_it_needs_no_jax():
    code = "import sys, jaxtp.load, jaxtp.cli.load; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_request_is_sent_once_with_the_lengths_that_were_drawn():
    with serving() as fake:
        first, second = run(fake, Level(2, 5), Level(3, 7, warmups=1), ignore_eos=True)
    assert (len(fake.bodies), first.record["completed"], second.record["completed"]) == (2 + 5 + 1 + 7, 5, 7)
    assert all(4 <= len(body["prompt"]) <= 12 and 3 <= body["max_tokens"] <= 9 for body in fake.bodies)
    assert len({tuple(body["prompt"]) for body in fake.bodies}) == 15  # no cache of prefixes helps
    assert first.record["total_output_tokens"] == sum(body["max_tokens"] for body in fake.bodies[2:7])
    assert first.record["total_input_tokens"] == 5 * 7  # the server's count goes before ours
    assert {key: fake.bodies[0][key] for key in fake.bodies[0].keys() - {"prompt", "max_tokens"}} == {
        "model": "tiny",
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }


def test_a_seed_fixes_prompts_and_lengths():
    def bodies(seed):
        with serving() as fake:
            run(fake, Level(1, 4), Level(1, 2), seed=seed)
        return fake.bodies

    assert bodies(1) == bodies(1) != bodies(2)


def test_as_many_run_at_once_as_were_asked():
    with serving(together=3) as fake:  # with fewer at once, none would be answered
        (level,) = run(fake, Level(3, 9))
    assert (fake.peak, level.record["completed"]) == (3, 9)


@pytest.mark.parametrize("usage", [True, False], ids=["usage", "no usage"])
@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_times_are_those_of_the_tokens(chat, usage):
    source = Hi() if chat else TextPrompts(Tokenizer(DEMO), Lengths(4), Lengths(6))
    with serving(delay=0.02, usage=usage, bundled=2) as fake:
        (answer,) = ask(fake, source=source, chat=chat)
    (sent,) = fake.sent
    assert answer.error is None
    assert (answer.output_tokens, answer.counted, answer.prompt_tokens) == ((12, True, 7) if usage else (6, False, 4))
    # one clock: nothing is sent before it was asked for, nor seen before it was sent
    assert answer.start <= fake.came[0] <= sent[0] <= answer.first <= answer.end
    assert len(answer.gaps) == 5
    seen = answer.first + np.cumsum([0, *answer.gaps])
    assert (seen >= sent).all()
    assert seen[-1] <= answer.end
    assert answer.first < sent[-1]  # seen as it came: not all at the end


def test_chat_sends_a_message_of_a_user():
    with serving() as fake:
        ask(fake, source=Hi(), chat=True)
    assert fake.bodies[0]["messages"] == [{"role": "user", "content": "Hi"}]
    assert "prompt" not in fake.bodies[0]


def test_usage_in_the_last_chunk_and_no_done_is_a_complete_answer():
    with serving(script=["last"]) as fake:
        (answer,) = ask(fake)
    assert (answer.error, answer.output_tokens, answer.prompt_tokens, len(answer.gaps)) == (None, 6, 7, 5)
    assert "" in PIECES[:6]  # a chunk without text that does not end the answer is a token


ERRORS = {
    "busy": ("status 503", "the queue is full"),
    "detail": ("status 400", "prompt must be a string."),
    "cut": ("stream cut short", "the stream ended after 2 chunks, without a finish_reason"),
    "die": ("connection lost", ""),
    "garbage": ("no chunk of a stream", "<html>"),
    "list": ("no chunk of a stream", ""),
    "error": ("error in the stream", "the engine ended"),
    "none": ("no tokens", "the stream ended without a token"),
    "slow": ("timeout", "no end after 0.5 s"),
}


@pytest.mark.parametrize("act", ERRORS)
def test_what_goes_wrong_is_an_error_of_its_kind(act):
    with serving(script=["ok", act, "ok"]) as fake:
        answers = ask(fake, 3, timeout=0.5 if act == "slow" else 20)
    kind, said = ERRORS[act]
    assert [a.error for a in answers] == [None, kind, None]  # and the next request is answered
    assert said in answers[1].message
    assert answers[1].end >= answers[1].start


def test_errors_are_counted_and_the_others_measured():
    with serving(script=["ok", "busy", "cut", "busy", "garbage"]) as fake:
        (level,) = run(fake, Level(1, 8, warmups=0))
    assert (level.record["completed"], level.record["failed"]) == (4, 4)
    assert {kind: count for kind, (count, _) in level.errors.items()} == {
        "status 503": 2,
        "stream cut short": 1,
        "no chunk of a stream": 1,
    }


def test_a_server_that_ends_leaves_no_request_waiting():
    with serving(script=["ok", "ok", "end"]) as fake:
        (level,) = run(fake, Level(1, 6, warmups=0))
    assert level.record["completed"] == 2
    assert {kind: count for kind, (count, _) in level.errors.items()} == {"connection lost": 1, "no connection": 3}


def test_where_nothing_answers_it_says_so_before_any_load():
    with serving() as fake:
        pass
    with pytest.raises(ConnectionError, match=rf"there is no server at {fake.url}: Connect call failed"):
        run(fake, Level(1, 1))
    with pytest.raises(RuntimeError, match="no request to warm up completed: no connection: Connect call failed"):
        run(fake, Level(1, 1), model="tiny")


def test_a_refusal_of_the_warm_up_ends_it_with_what_the_server_said():
    with (
        serving(script=["detail"] * 2) as fake,
        pytest.raises(RuntimeError, match="to warm up completed: status 400: prompt must be a string"),
    ):
        run(fake, Level(2, 5))
    assert len(fake.bodies) == 2


def test_the_key_is_sent():
    with serving(key="k") as fake:
        assert run(fake, Level(1, 1), api_key="k")[0].record["completed"] == 1
        with pytest.raises(ValueError, match="answers 401: which key"):
            run(fake, Level(1, 1), api_key="x")


@pytest.mark.parametrize(("burstiness", "spread"), [(1, 1.0), (0.25, 2.0), (100, 0.1)])
def test_arrivals_are_poissons_or_as_bursty_as_was_asked(burstiness, spread):
    times = arrivals(Level(None, 20_000, rate=50.0, burstiness=burstiness), np.random.default_rng(0))
    gaps = np.diff(times, prepend=0)
    assert times[-1] == pytest.approx(20_000 / 50)
    assert (gaps >= 0).all()
    assert gaps.std() / gaps.mean() == pytest.approx(spread, rel=0.05)  # of a gamma distribution: burstiness**-0.5
    if burstiness == 1:
        assert np.mean(gaps > 1 / 50) == pytest.approx(math.exp(-1), abs=0.01)


def test_arrivals_are_fixed_by_the_seed_and_at_once_without_a_rate():
    level = Level(None, 9, rate=3.0)
    first, again, other = (arrivals(level, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()
    assert (arrivals(Level(4, 9), np.random.default_rng(0)) == 0).all()


def test_requests_come_at_their_times_whether_or_not_others_are_answered():
    level = Level(None, 8, rate=40.0, warmups=0)
    with serving(together=8) as fake:  # none is answered before the last has come
        start = time.perf_counter()
        (found,) = run(fake, level, seed=3)
    expected = arrivals(level, np.random.default_rng([3, 0]))
    assert (np.array(fake.came) - start >= expected).all()
    assert found.record["completed"] == 8
    assert found.record["duration"] >= expected[-1]


def test_a_rate_may_have_a_limit_of_requests_at_once():
    with serving() as fake:
        run(fake, Level(2, 12, rate=1000.0, warmups=0))
    assert fake.peak <= 2


@pytest.mark.parametrize("changes", [{"concurrency": 0}, {"prompts": 0}, {"warmups": -1}, {"rate": 0.0}, {"burstiness": 0.0}])
def test_levels_that_cannot_be_are_refused(changes):
    with pytest.raises(ValueError, match="must be"):
        Level(**{"concurrency": 1, "prompts": 1, **changes})
