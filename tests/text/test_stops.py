"""Stop strings: where they count, what is shown before them, and those that cannot come."""

import json
import logging
import random

import pytest
import spellings
import tiny
from completions import Completion

from jaxtp import SamplingParams
from jaxtp.generate.load import eos_of
from jaxtp.text import Tokenizer, find_stop, held


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(spellings.save(spellings.byte_level(), tmp_path_factory.mktemp("stops")))


def run(tokenizer, said, **params):
    """(the output, what it showed) of `said`, which comes token by token after a prompt."""
    ids = tokenizer.encode(said)
    asked = SamplingParams(max_tokens=len(ids), ignore_eos=True, **params)
    completion, shown = Completion(tokenizer, [300], asked, most=len(ids), show=True), []
    for token in ids:
        completion.take([token])
        shown.append(completion.output.text)
    assert completion.told == completion.output.text
    return completion.output, shown


def test_random_texts_and_stops_against_a_search_of_every_beginning(tokenizer):
    """The text ends at the first stop string that a token ends behind `min_tokens`; what was shown is never taken back."""
    rng = random.Random(5)
    ends = {"stop": 0, "length": 0}
    for _ in range(1500):
        said = "".join(rng.choice("aab é\n😀") for _ in range(rng.randint(1, 14)))
        stops = ["".join(rng.choice("aab é\n😀") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        ids, keeps = tokenizer.encode(said), rng.random() < 0.5
        least = rng.randint(0, len(ids))
        output, shown = run(tokenizer, said, stop=stops, min_tokens=least, include_stop_str_in_output=keeps)
        texts = [tokenizer.decode(ids[:count]).rstrip("\ufffd") for count in range(len(ids) + 1)]
        expected, count = (said, None), len(ids)
        for made in range(max(least, 1), len(ids) + 1):
            new = len(texts[made - 1])
            found = [(at, s) for s in stops for at in range(len(said)) if texts[made].startswith(s, at) and at + len(s) > new]
            if found:
                at = min(found)[0]
                options = {s for a, s in found if a == at}
                expected, count = ([said[: at + len(s) * keeps] for s in options], options), made
                break
        if count == len(ids) and expected == (said, None):
            assert (output.text, output.finish_reason, output.stop_reason) == (said, "length", None)
        else:
            assert output.text in expected[0]
            assert output.stop_reason in expected[1]
            assert output.finish_reason == "stop"
            assert len(output.token_ids) == count
        assert all(output.text.startswith(text) for text in shown), (said, stops, shown)
        ends[output.finish_reason] += 1
    assert min(ends.values()) > 200


def test_min_tokens_with_two_stop_strings(tokenizer):
    for stops in (["I"], ["I", "QQQQQQ"]):
        for keeps in (True, False):
            output, shown = run(tokenizer, " I will not", stop=stops, min_tokens=4, include_stop_str_in_output=keeps)
            assert (output.text, output.finish_reason) == (" I will not", "length")
            assert shown[1] == " I"


def test_only_what_may_become_a_stop_string_is_held_back(tokenizer):
    output, shown = run(tokenizer, "abcdefghijabc", stop=["abcd!", "a very long stop string that never comes"])
    assert shown[-2:] == ["abcdefghij", "abcdefghijabc"]
    assert (shown[3], shown[4]) == ("", "abcde")
    assert output.text == "abcdefghijabc"
    assert run(tokenizer, "abcdefghijabc", stop=["abcd!"], include_stop_str_in_output=True)[1][0] == "a"


def test_the_longest_beginning_and_the_first_string():
    assert held("say ab", ["abc", "b then"]) == 2
    assert held("say abc", ["abc"]) == 0
    assert find_stop("x I y", ["I", "QQQQQQ"], searched=3) is None
    assert find_stop("x I y", ["I", "QQQQQQ"], searched=2) == (2, "I")
    assert find_stop("xabc", ["c", "abc"], searched=3) == (1, "abc")


def test_who_says_what_ends_a_text(tmp_path, tokenizer, caplog):
    config = tiny.config(eos_token_ids=(), vocab_size=500)
    with caplog.at_level(logging.INFO, "jaxtp"):
        assert eos_of(config, None, {}, tokenizer) == (tokenizer.eos_id,)
    assert "texts end at the tokenizer's" in caplog.text
    assert eos_of(config, None, {"eos_token_id": None}, tokenizer) == ()
    assert eos_of(config, None, {}, None) == ()
    assert eos_of(tiny.config(eos_token_ids=(7,)), None, {}, tokenizer) == (7,)
    assert eos_of(tiny.config(eos_token_ids=(), vocab_size=2), None, {}, tokenizer) == ()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert eos_of(config, str(tmp_path), {}, tokenizer) == (3, 4)
