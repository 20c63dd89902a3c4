"""What cannot be is refused: by name, in one form, with the right status, and never after the engine was asked."""

import contextlib
import http.client
import json
from urllib.parse import urlsplit

import fake_engine
import pytest
import serving

from jaxtp.serve.errors import form

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"prompt": "Hi"}


@pytest.fixture(scope="module")
def engine():
    return fake_engine.FakeEngine(serving.tokenizer())


@pytest.fixture(scope="module")
def server(engine):
    with serving.serving(serving.served(engine)) as running:
        yield running


@pytest.fixture
def idle(engine):
    """The engine makes no step while the test runs."""
    steps = engine.steps
    yield
    assert engine.steps == steps


def ask(server, method, path, body=None, *, headers=None, json_body=True):
    """(status, headers, value of the body)."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=20)
    sent = json.dumps(body) if json_body and body is not None else body
    sent_headers = {"content-type": "application/json"} if body is not None and json_body else {}
    with contextlib.closing(connection):
        connection.request(method, path, sent, {**sent_headers, **(headers or {})})
        with connection.getresponse() as answer:
            found = answer.read()
    return answer.status, answer.headers, json.loads(found) if found else None


def refused(answer, status):
    """The error of an answer, which must have the form of OpenAI's."""
    found, headers, body = answer
    assert found == status, body
    assert headers["content-type"] == "application/json"
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return body["error"]


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        # unknown, missing, and of the wrong type
        ({"tempreature": 1}, "tempreature", "tempreature is no field of this request"),
        ({"prompt": None}, "prompt", "prompt must be a text, a list of texts, token ids, or a list of lists of token ids"),
        ({"prompt": []}, "prompt", "prompt must be a text, a list of texts, token ids"),
        ({"prompt": [[]]}, "prompt.0", "prompt.0 list should have at least 1 item"),
        ({"prompt": ["a", 1]}, "prompt.1", "prompt.1 must be a valid string; given: 1"),
        ({"prompt": [1, "a"]}, "prompt.1", "prompt.1 must be a valid integer; given: 'a'"),
        ({"prompt": [True]}, "prompt.0", "prompt.0 must be a valid integer; given: True"),
        ({"prompt": [1.0]}, "prompt", "prompt must be a text, a list of texts, token ids"),
        ({"prompt": {}}, "prompt", "prompt must be a text"),
        ({"temperature": "1"}, "temperature", "temperature must be a valid number; given: '1'"),
        ({"temperature": True}, "temperature", "temperature must be a valid number; given: True"),
        ({"max_tokens": 1.0}, "max_tokens", "max_tokens must be a valid integer; given: 1.0"),
        ({"max_tokens": "9"}, "max_tokens", "max_tokens must be a valid integer"),
        ({"stream": 1}, "stream", "stream must be a valid boolean; given: 1"),
        ({"stop": 1}, "stop", "stop must be a text or a list of at most four; given: 1"),
        ({"stop": list("abcde")}, "stop", "stop list should have at most 4 items after validation, not 5"),
        ({"stop": [""]}, "stop", "stop holds an empty string"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "logit_bias.x string should match pattern"),
        ({"logit_bias": [1]}, "logit_bias", "logit_bias must be a valid dictionary"),
        ({"stop_token_ids": 5}, "stop_token_ids", "stop_token_ids must be a valid list; given: 5"),
        ({"request_id": ""}, "request_id", "request_id string should have at least 1 character"),
        ({"metadata": {"a": 1}}, "metadata.a", "metadata.a must be a valid string; given: 1"),
        # out of range
        ({"temperature": -1}, "temperature", "temperature=-1.0 must be at least 0 (0 is greedy) and finite"),
        ({"top_p": 0}, "top_p", "top_p=0.0 must be in (0, 1]"),
        ({"top_k": -2}, "top_k", "top_k=-2 must be at least 1, or 0 or -1 for all tokens"),
        ({"top_k": 10**30}, "top_k", "must be at most 128, the size of the vocabulary"),
        ({"min_p": 2}, "min_p", "min_p=2.0 must be in [0, 1]"),
        ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty=0.0 must be above 0"),
        ({"temperature": 10**40}, "temperature", "temperature=1e+40 must be at least 0 (0 is greedy) and finite in float32"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty", "repetition_penalty=1e-40 must be above 0"),
        ({"presence_penalty": 3}, "presence_penalty", "presence_penalty=3.0 must be in [-2, 2]"),
        ({"frequency_penalty": -3}, "frequency_penalty", "frequency_penalty=-3.0 must be in [-2, 2]"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "logit_bias.5 must be less than or equal to 100; given: 101"),
        ({"logit_bias": {"500": 1}}, "logit_bias", "logit_bias has token ids [500], outside the vocabulary of 128"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "stop_token_ids has token ids [-1], outside the vocabulary of 128"),
        ({"seed": 2**63}, "seed", "seed must be less than 9223372036854775808"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens=0 must be at least 1"),
        ({"max_tokens": 511}, "max_tokens", "the prompt has 2 tokens and max_tokens asks for 511 more; prompt and completion"),
        ({"min_tokens": 17}, "min_tokens", "min_tokens=17 must be in [0, max_tokens=16]"),
        ({"n": 0}, "n", "n=0 must be at least 1"),
        ({"n": 129}, "n", "n is 129; this server takes at most 128 (--max-n)"),
        ({"logprobs": 65}, "logprobs", "logprobs=65 must be in [0, 64]"),
        ({"priority": 2**31}, "priority", "priority must be less than 2147483648"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "truncate_prompt_tokens must be at least 1, or -1"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "must be greater than or equal to -1"),
        ({"prompt": [1] * 512}, "prompt", "the prompt has 512 tokens; prompt and completion together have at most 512"),
        ({"prompt": [128]}, "prompt", "a prompt has token ids [128], outside the vocabulary of 128"),
        ({"prompt": [10**30]}, "prompt", "outside the vocabulary of 128"),
        ({"prompt": [-5, 2**40], "echo": True}, "prompt", "prompt has token ids [-5, 1099511627776], which no vocabulary has"),
        ({"prompt": ""}, "prompt", "a prompt has no tokens"),
        ({"prompt": ["x"] * 257}, "prompt", "prompt holds 257; this server takes at most 256 in a request (--max-prompts)"),
        # what does not go together
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options goes with stream: true"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
            "goes with include_usage: true",
        ),
        ({"echo": True, "logprobs": 1}, "echo", "echo does not go with logprobs"),
        ({"best_of": 2}, "best_of", "best_of must be n, 1, where it is given"),
        ({"priority": 1}, "priority", "priority changes nothing here: the server was started without --scheduling-policy"),
        # what is not there
        ({"suffix": "x"}, "suffix", "suffix is not supported; leave it out"),
        ({"store": True}, "store", "store is not supported; leave it out, or say false"),
        ({"store": 0}, "store", "store is not supported"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "prompt_logprobs is not supported"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids", "allowed_token_ids is not supported"),
        ({"bad_words": ["x"]}, "bad_words", "bad_words is not supported"),
        ({"cache_salt": "x"}, "cache_salt", "cache_salt is not supported"),
        ({"use_beam_search": True}, "use_beam_search", "use_beam_search is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "response_format is not there yet: answers are free"),
        ({"guided_json": {}}, "guided_json", "guided_json is not there yet"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "is not supported"),
    ],
)
@pytest.mark.usefixtures("idle")
def test_completions_that_cannot_be(server, changes, param, message):
    error = refused(ask(server, "POST", "/v1/completions", {**TEXT, **changes}), 400)
    assert message in error["message"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert len(error["message"]) < 300


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"messages": []}, "messages", "messages list should have at least 1 item"),
        ({"messages": "Hi"}, "messages", "messages must be a valid list; given: 'Hi'"),
        ({"messages": [{"content": "Hi"}]}, "messages.0.role", "messages.0.role is missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "must be a text or a list of parts of text"),
        ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, "messages.0.weight", "messages.0.weight is no field"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "a"}]}]},
            "messages.0.content.0.type",
            "messages.0.content.0.type must be 'text'; given: 'image_url'",
        ),
        (
            {"messages": [{"role": "judge", "content": "Hi"}]},
            "messages",
            "the chat template refuses this conversation: no role",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "the text holds half of a surrogate pair"),
        ({"tools": [{}]}, "tools", "tools is not there yet: no tools are called"),
        ({"tool_choice": "auto"}, "tool_choice", "tool_choice is not there yet"),
        ({"functions": [{}]}, "functions", "functions is not there yet"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "answers are free text"),
        ({"modalities": ["text", "audio"]}, "modalities", "models here read and write text alone"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "reasoning_effort is not supported"),
        ({"logprobs": 5}, "logprobs", "logprobs must be a valid boolean"),
        ({"top_logprobs": 5}, "top_logprobs", "top_logprobs goes with logprobs: true"),
        ({"logprobs": True, "top_logprobs": 65}, "top_logprobs", "top_logprobs=65 must be in [0, 64]"),
        (
            {"max_tokens": 4, "max_completion_tokens": 5},
            "max_tokens",
            "is the old name of max_completion_tokens, and they differ",
        ),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens=0 must be at least 1"),
        ({"max_completion_tokens": 600}, "max_completion_tokens", "and max_completion_tokens asks for 600 more"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "which --trust-request-chat-template lets requests bring"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "cannot set chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "cannot set messages"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt", "does not go with"),
        ({"prompt": "x"}, "prompt", "prompt is no field of this request"),
        ({"echo": True}, "echo", "echo is not supported"),
    ],
)
@pytest.mark.usefixtures("idle")
def test_chats_that_cannot_be(server, changes, param, message):
    error = refused(ask(server, "POST", "/v1/chat/completions", {**CHAT, **changes}), 400)
    assert message in error["message"]
    assert error["param"] == param


def test_messages_can_be_sent_whatever_they_quote():
    error = form(400, "no \ud800", param="\udfff")["error"]
    assert (error["message"], error["param"]) == ("no \\ud800", "\\udfff")


def test_several_mistakes_are_told_at_once(server):
    error = refused(ask(server, "POST", "/v1/completions", {"top_p": "x", "stream": "y"}), 400)
    assert error["message"] == (
        "top_p must be a valid number; given: 'x'; stream must be a valid boolean; given: 'y'; prompt is missing"
    )
    assert (error["param"], error["code"]) == ("top_p", "invalid_type")
    many = refused(ask(server, "POST", "/v1/completions", {**TEXT, **{f"x{i}": i for i in range(50)}}), 400)
    assert many["message"].endswith("; and 45 more")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is missing: a JSON object is needed"),
        (b"{", "the body is not valid JSON: Expecting property name enclosed in double quotes (character 1)"),
        (b"[1]", "the body must be a valid dictionary or object to extract fields from"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature must be a finite number; given: nan"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature must be a finite number; given: inf"),
        (b'{"prompt": "\xff"}', "the body is not JSON that can be read"),
        (b"[" * 100_000, "the body is not JSON that can be read"),
        (b'{"prompt": [' + b"9" * 5000 + b"]}", "the body is not JSON that can be read"),
        (b'{"prompt": "x", "\\ud800": 1}', "the body must be a valid string, unable to parse raw data as a unicode string"),
        (b'{"prompt": "x", "request_id": "\\ud800"}', "request_id must be a valid string, unable to parse raw data"),
    ],
)
def test_bodies_that_are_no_requests(server, body, message):
    answer = ask(
        server, "POST", "/v1/completions", body, json_body=False, headers={"content-type": "application/json; charset=utf-8"}
    )
    assert message in refused(answer, 400)["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"tools": []},
        {"tools": None, "tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"parallel_tool_calls": True},
        {"logit_bias": None, "stop": None, "n": None, "seed": -5},
        {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "s"},
    ],
)
def test_fields_that_change_nothing_are_taken(server, body):
    status, _, found = ask(server, "POST", "/v1/chat/completions", {**CHAT, "temperature": 0, "max_tokens": 3, **body})
    plain = ask(server, "POST", "/v1/chat/completions", {**CHAT, "temperature": 0, "max_tokens": 3})[2]
    assert status == 200
    assert found["choices"] == plain["choices"]


def test_models_routes_methods_and_content_types(server):
    error = refused(ask(server, "POST", "/v1/completions", {**TEXT, "model": "gpt-4"}), 404)
    assert (error["message"], error["code"]) == ("there is no model 'gpt-4' here; there is tiny", "model_not_found")
    assert error["param"] == "model"
    for path in ("/tokenize", "/detokenize"):
        body = {"model": "gpt-4", "tokens": [1]} if path == "/detokenize" else {"model": "gpt-4", "prompt": "x"}
        assert refused(ask(server, "POST", path, body), 404)["code"] == "model_not_found"
    assert "there is no GET /v1/nothing" in refused(ask(server, "GET", "/v1/nothing"), 404)["message"]
    assert refused(ask(server, "GET", "/v1/models/"), 404)["type"] == "not_found_error"
    answer = ask(server, "GET", "/v1/completions")
    assert "there is no GET /v1/completions; it takes POST" in refused(answer, 405)["message"]
    assert answer[1]["allow"] == "POST"
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        answer = ask(server, "POST", "/v1/completions", b'{"prompt": "x"}', json_body=False, headers={"content-type": kind})
        assert "it must be application/json" in refused(answer, 415)["message"]


def test_tokenize_and_detokenize(server):
    text = "Hello"
    ids = serving.tokenizer().encode(text)
    found = ask(server, "POST", "/tokenize", {"prompt": text, "return_token_strs": True})[2]
    assert found == {"count": 5, "max_model_len": 512, "tokens": ids, "token_strs": list(text)}
    chat = ask(server, "POST", "/tokenize", {**CHAT, "model": "tiny"})[2]
    assert chat["tokens"] == serving.tokenizer().encode("user: Hi assistant: ")
    assert chat["token_strs"] is None
    assert ask(server, "POST", "/detokenize", {"tokens": ids})[2] == {"prompt": text}
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "x", "extra": 1}, "extra"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
    ):
        assert refused(ask(server, "POST", path, body), 400)["param"] == param


def test_a_model_without_a_tokenizer_takes_token_ids():
    engine = fake_engine.FakeEngine(None)
    with serving.serving(serving.served(engine)) as server:
        done = ask(server, "POST", "/v1/completions", {"prompt": [5, 6], "max_tokens": 2, "logprobs": 1})
        assert done[0] == 200
        assert done[2]["choices"][0]["logprobs"]["tokens"][0].startswith("token_id:")
        for path, body, param in (
            ("/v1/completions", TEXT, "prompt"),
            ("/v1/completions", {"prompt": [5], "echo": True}, "echo"),
            ("/v1/chat/completions", CHAT, "messages"),
            ("/tokenize", TEXT, "prompt"),
            ("/detokenize", {"tokens": [5]}, "tokens"),
        ):
            error = refused(ask(server, "POST", path, body), 400)
            assert (error["param"], "this model has no tokenizer" in error["message"]) == (param, True)
