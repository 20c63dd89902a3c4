"""The text of a completion: the same however it is cut, shown, and stopped; and the right one."""

import random

import pytest
import spellings
from completions import Completion
from spellings import KINDS, right, save, spelled, text
from tokenizers import decoders
from tokenizers.decoders import DecodeStream

import jaxtp.checkpoint.hf as hf
from jaxtp import SamplingParams
from jaxtp.text import GrowingText, Tokenizer
from jaxtp.text.grow import Spelling

CASES = {**dict.fromkeys(KINDS, 2400), "demo": 2400, "stories": 1200}
PARAMS = {
    (skip, stop): SamplingParams(max_tokens=None, ignore_eos=True, skip_special_tokens=skip, stop=stop)
    for skip in (True, False)
    for stop in ((), ("\ue000 never", "\ue000\ue001"))
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spellings")
    return {kind: Tokenizer(save(make(), folder / kind)) for kind, make in KINDS.items()}


@pytest.fixture
def tokenizer(kind, tokenizers, request):
    if kind == "stories":
        return Tokenizer(request.getfixturevalue("stories"))
    return Tokenizer(hf.DEMO) if kind == "demo" else tokenizers[kind]


def case(tokenizer, rng):
    """(prompt, completion) as ids: a text cut at any token, or ids that nobody would write."""
    if rng.random() < 0.6:
        ids = tokenizer.encode(text(rng, 12) + text(rng, 12))
        at = rng.randint(0, len(ids))
        ids, end = (ids[:at], ids[at:]), rng.choice([0, 0, 1, 2])
        return ids[0], ids[1][: len(ids[1]) - end]
    few = [rng.randrange(tokenizer.size + 2) for _ in range(3)]
    some = [rng.choice(few) if rng.random() < 0.4 else rng.randrange(tokenizer.size + 2) for _ in range(rng.randint(2, 20))]
    at = rng.randrange(len(some))
    return some[:at], some[at : rng.randint(at, len(some))]


def answer(tokenizer, prompt, completion, params, rng, *, show):
    """(the text, all texts shown on the way) of a completion that comes in steps of some tokens."""
    grows, shown, done = Completion(tokenizer, prompt, params, most=len(completion), show=bool(show)), [], 0
    while done < len(completion):
        step = 1 if show == "each" else rng.randint(1, 5) if show else len(completion)
        grows.take(completion[done : done + step])
        shown.append(grows.output.text)
        done += step
    assert grows.told == grows.output.text
    return grows.output.text, shown


@pytest.mark.parametrize("kind", CASES)
def test_one_text_for_all_ways_and_the_right_one(kind, tokenizer):
    rng = random.Random(f"text {kind}")
    for _ in range(CASES[kind]):
        prompt, completion = case(tokenizer, rng)
        skip = rng.random() < 0.8
        expected = right(tokenizer, prompt, completion, skip=skip) if completion else ""
        where = (kind, prompt, completion, skip)
        for stop, show in ((False, None), (False, "each"), (False, "some"), (True, rng.choice([None, "each"]))):
            params = PARAMS[skip, PARAMS_STOP if stop else ()]
            whole, shown = answer(tokenizer, prompt, completion, params, rng, show=show)
            assert whole == expected, where
            assert all(whole.startswith(part) for part in shown), where


PARAMS_STOP = ("\ue000 never", "\ue000\ue001")


@pytest.mark.parametrize("kind", ["llama 2", "gemma", "byte level", "demo", "stories"])
def test_a_text_that_is_encoded_comes_back_wherever_it_is_cut(kind, tokenizer):
    """A prompt that ends anywhere: behind its whole characters comes the rest of what the tokenizer itself decodes."""
    rng = random.Random(f"cut {kind}")
    for _ in range(60):
        ids = tokenizer.encode(text(rng, 20).replace("▁", ""))
        whole = tokenizer.decode(ids)
        front = kind in ("llama 2", "stories")  # a space that the decoder strips
        for at in range(2, len(ids)):
            size = len(spelled(tokenizer, ids[:at], skip=True)) - front
            expected = whole[len(whole.encode()[:size].decode("utf-8", "ignore")) :]
            assert answer(tokenizer, ids[:at], ids[at:], PARAMS[True, ()], rng, show=None)[0] == expected


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("Two more, please: 😀😀", "😀🎉 done"), ("ขอบคุณ", "ครับ"), ("x 🎉🎉", "\tok"), ("def f():", "\n\treturn"), ("a", "   b")],
)
def test_bytes_before_the_border_change_nothing(tokenizers, prompt, completion):
    for kind in ("llama 2", "byte level"):
        tokenizer = tokenizers[kind]
        known, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + completion)
        if whole[: len(known)] == known:
            for show in (None, "each"):
                found = answer(tokenizer, known, whole[len(known) :], PARAMS[True, ()], random.Random(0), show=show)[0]
                assert found == completion


@pytest.mark.parametrize(
    ("said", "cut", "left"), [(" 😀😀😀", 2, " 😀😀\ufffd\ufffd"), ("\n😀", 2, "\n\ufffd\ufffd"), ("😀é", 1, "😀")]
)
def test_a_cut_inside_a_character_loses_only_that(tokenizers, said, cut, left):
    tokenizer = tokenizers["llama 2"]
    prompt = tokenizer.encode("hello")
    ids = tokenizer.encode("hello" + said)[len(prompt) : -cut]
    for params in (PARAMS[True, ()], PARAMS[True, PARAMS_STOP]):
        for show in (None, "each"):
            assert answer(tokenizer, prompt, ids, params, random.Random(0), show=show)[0] == left


def test_only_the_beginning_of_a_text_is_stripped(tokenizers):
    """Of any number of spaces; and a prompt of bytes that are no character is not nothing."""
    for count, left in ((1, 19), (64, 0)):
        backend = spellings.byte_fallback(strip=True)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", count, 0)]
        backend.decoder = decoders.Sequence(steps)
        spelling, ids = Spelling(backend), [backend.token_to_id(name) for name in ["▁"] * 20 + ["a"]]
        word, byte = backend.token_to_id("a"), backend.token_to_id("<0xCF>")
        for prompt, spaces in (([1], left), ([word], 20), ([byte], 20), ([word, *ids[:-1]], 20)):
            grows = GrowingText(spelling, prompt)
            for token in ids:
                grows.add([token])
            assert grows.text == " " * spaces + "a"


def test_characters_are_shown_as_soon_as_they_are_whole(tokenizers):
    for kind in ("llama 2", "byte level"):
        tokenizer = tokenizers[kind]
        prompt = tokenizer.encode("x")
        ids = tokenizer.encode("xखगघ" * 40)[len(prompt) :]
        grows, pieces = tokenizer.growing(prompt), [tokenizer.backend.id_to_token(token) for token in ids]
        longest = 0
        for count in range(len(ids)):
            grows.add([ids[count]])
            longest = max(
                longest, len(right(tokenizer, prompt, ids[: count + 1], skip=True).rstrip("\ufffd")) - len(grows.text)
            )
        assert longest == 0, pieces


@pytest.mark.parametrize("kind", KINDS)
def test_the_work_of_a_token_does_not_grow_with_the_text(kind, tokenizers, monkeypatch):
    """Counted in pieces that are put together, over ids of which most bytes never become characters."""
    tokenizer, counts = tokenizers[kind], []
    joined = Spelling.joined

    def counted(self, pieces):
        counts.append(len(pieces))
        return joined(self, pieces)

    monkeypatch.setattr(Spelling, "joined", counted)
    rng = random.Random(1)
    ids = [rng.randrange(4, tokenizer.size) for _ in range(3000)]
    grows = tokenizer.growing(ids[:5])
    for token in ids:
        grows.add([token])
    assert max(counts, default=0) <= 12
    assert len(counts) <= 2 * len(ids) + 2


def test_the_library_s_own_stream_does_not_do(tokenizers):
    """Why there is a `GrowingText`: each line fails a property that the tests above ask for."""
    tokenizer = tokenizers["llama 2"]
    prompt, ids = tokenizer.encode("x 😀"), tokenizer.encode("x 😀😀")

    def stream(known, new, kind="llama 2"):
        made = DecodeStream(ids=known, skip_special_tokens=True)
        return [made.step(tokenizers[kind].backend, token) for token in new]

    cut = ids[len(prompt) : -2]
    assert stream(prompt, cut) == [None] * len(cut)  # nothing of what is left of a character at the end
    inside = prompt[:-1]
    assert "".join(filter(None, stream(inside, ids[len(inside) :]))) != "😀😀"  # gives the prompt again
    with pytest.raises(Exception, match="Invalid prefix"):
        stream(prompt, [tokenizer.backend.token_to_id("<0xFF>"), tokenizer.backend.token_to_id("a")])


def test_the_cases_are_many_and_hold_all_bytes():
    assert sum(CASES.values()) >= 20_000
    assert sorted(spellings.TABLE.values()) == list(range(256))
