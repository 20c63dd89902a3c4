"""Rendered conversations and what is learned of them: the same as transformers'."""

import json
import random
import warnings

import chats
import pytest
import spellings
from chats import CHATML, GEMMA, MARKED, QWEN_3, TEMPLATES, TOOLS

from jaxtp.text import Tokenizer

TURNS = [("user", "Hi"), ("assistant", "Yes"), ("user", "No"), ("assistant", "So")]
TALK = [{"role": role, "content": content} for role, content in TURNS]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(ours, transformers') of one folder that has every template by its name."""
    from transformers import AutoTokenizer

    backend = spellings.byte_level()
    backend.add_special_tokens(chats.SPECIAL)
    listed = [{"name": name, "template": source} for name, source in TEMPLATES.items()]
    folder = spellings.save(
        backend, tmp_path_factory.mktemp("chats"), chat_template=listed, sep_token="<sep>", mark_token="<mark>"
    )
    return Tokenizer(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def ours(made):
    return made[0]


def rendered(function):
    """What comes of it: the text, or that it was refused with some message."""
    try:
        return function()
    except Exception as error:
        return type(error).__name__, " ".join(str(error).split())


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_equal_transformers(made, name):
    ours, theirs = made
    rng, kinds = random.Random(name), {"refused": 0, "rendered": 0}
    tooled = name in ("llama 3.1", "mistral", "qwen 2.5", "qwen 3")
    for _ in range(60):
        messages = chats.conversation(rng, tools=tooled, system=name != "gemma" or rng.random() < 0.2)
        options = {"add_generation_prompt": rng.random() < 0.5, "date_string": "26 Jul 2024"}
        if tooled and rng.random() < 0.5:
            options["tools"] = TOOLS
        if name == "qwen 3" and rng.random() < 0.7:
            options["enable_thinking"] = rng.random() < 0.5
        if name == "rag":
            options["documents"] = [{"title": "Où", "text": messages[0]["content"]}, {"title": "b", "text": "<&>"}]
        mine = rendered(lambda: ours.chat(messages, chat_template=name, **options))  # noqa: B023
        other = rendered(
            lambda: theirs.apply_chat_template(messages, chat_template=TEMPLATES[name], tokenize=False, **options)  # noqa: B023
        )
        if isinstance(other, tuple):
            kinds["refused"] += 1
            assert mine[0] == "ValueError", (mine, other)
            assert other[1] in mine[1]
        else:
            kinds["rendered"] += 1
            assert mine == other
            ids = ours.encode(mine, add_special_tokens=False)
            assert ids == theirs.encode(other, add_special_tokens=False)
    assert kinds["rendered"] > 5


@pytest.mark.parametrize("name", ["chatml", "llama 3", "gemma", "phi", "qwen 2.5"])
def test_a_last_message_that_goes_on_equals_transformers(made, name):
    ours, theirs = made
    rng = random.Random(name)
    for _ in range(30):
        messages = [*TALK, {"role": "user", "content": "a"}, {"role": "assistant", "content": spellings.text(rng, 20) + " x "}]
        options = {"add_generation_prompt": False, "continue_final_message": True}
        mine = ours.chat(messages, chat_template=name, **options)
        assert mine == theirs.apply_chat_template(messages, chat_template=TEMPLATES[name], tokenize=False, **options)
    with pytest.raises(ValueError, match="goes with add_generation_prompt=False"):
        ours.chat(TALK, chat_template=name, continue_final_message=True)


def test_what_a_template_marks_is_what_transformers_masks(made):
    ours, theirs = made
    rng = random.Random(3)
    ours.templates["default"] = MARKED
    for _ in range(60):
        messages = chats.conversation(rng, tools=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other = theirs.apply_chat_template(messages, chat_template=MARKED, return_assistant_tokens_mask=True)
        ids, learn = ours.conversation(messages)
        assert (ids, learn) == (other["input_ids"], [bool(x) for x in other["assistant_masks"]])
    ids, learn = ours.conversation(TALK, train_on="last")
    assert ours.decode([i for i, on in zip(ids, learn, strict=True) if on], skip_special_tokens=False) == "So<|im_end|>"
    del ours.templates["default"]


@pytest.mark.parametrize(
    ("source", "learned", "last"),
    [
        (CHATML, "Yes<|im_end|>\nSo<|im_end|>\n", "So<|im_end|>\n"),
        (GEMMA, "Yes<end_of_turn>\nSo<end_of_turn>\n", "So<end_of_turn>\n"),
        # the last answer is written with an empty thought, those before it without
        (QWEN_3, "Yes<|im_end|>\n<think>\n\n</think>\n\nSo<|im_end|>\n", "<think>\n\n</think>\n\nSo<|im_end|>\n"),
    ],
)
def test_what_the_assistant_says_is_learned(ours, source, learned, last):
    ours.templates["default"] = source
    try:
        parted = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in TALK]
        for talk in (TALK, parted):
            for train_on, expected in (("assistant", learned), ("last", last)):
                ids, learn = ours.conversation(talk, train_on=train_on)
                told = ours.decode([i for i, on in zip(ids, learn, strict=True) if on], skip_special_tokens=False)
                assert told == expected
            ids, learn = ours.conversation(talk, train_on="all")
            assert all(learn)
            assert ours.decode(ids, skip_special_tokens=False) == ours.chat(TALK, add_generation_prompt=False)
        with pytest.raises(ValueError, match=r'train_on=.* must be "assistant", "all" or "last"'):
            ours.conversation(TALK, train_on="some")
        ours.templates["default"] = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
        with pytest.raises(ValueError, match="changes earlier turns"):
            ours.conversation(TALK)
    finally:
        del ours.templates["default"]


# -- contents in parts ---------------------------------------------------------------------------------------------------


def part(text):
    return {"type": "text", "text": text}


def test_parts_are_joined_or_given_to_templates_that_loop_over_them(made):
    ours, theirs = made
    messages = [{"role": "user", "content": [part("a "), part("b")]}]
    joined = [{"role": "user", "content": "a \nb"}]
    assert ours.chat(messages, chat_template=CHATML) == ours.chat(joined, chat_template=CHATML)
    for source in (
        GEMMA,
        "{% for m in messages %}{% for c in m.content %}<{{ c.text }}>{% endfor %}{% endfor %}",
        "{% for m in messages %}{% set all = m['content'] %}{% for c in all | list %}<{{ c.text }}>{% endfor %}{% endfor %}",
    ):
        other = theirs.apply_chat_template(messages, chat_template=source, tokenize=False, add_generation_prompt=True)
        assert ours.chat(messages, chat_template=source) == other
        assert "b" in other
        assert "[" not in other
    named = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [part("b")]}]
    assert ours.chat(named, chat_template=CHATML, add_generation_prompt=False).endswith("assistant\nb<|im_end|>\n")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        (["Hi"], 'message 0 must be a dict with a "role" and a "content"; given: \'Hi\''),
        ([{"content": "Hi"}], 'must be a dict with a "role"'),
        ([TALK[0], {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "message 1 .*'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], 'a part without a "text"'),
        ([{"role": "user", "content": [7]}], "a part of type 'int'"),
        ([{"role": "user", "content": 7}], "neither a text nor a list of parts: 7"),
        ([{"role": "user", "content": {"a": 1}}], "neither a text nor a list of parts"),
        ([{"role": "user", "content": "x", "more": {1, 2}}], r"message 0: more holds {1, 2} \(set\), which is no JSON value"),
    ],
)
def test_messages_that_cannot_be_read(ours, messages, message):
    for call in (ours.chat, ours.conversation):
        ours.templates["default"] = CHATML
        with pytest.raises(ValueError, match=message):
            call(messages)
        del ours.templates["default"]


# -- what a template may do, and not -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{{ raise_exception('System role\n not supported') }}",
            "the chat template refuses this .*: System role not supported",
        ),
        ("{% if %}", "the chat template is not valid: "),
        ("{{ messages.nothing.more }}", "refuses this conversation: .* has no attribute 'nothing'"),
        ("{{ 'a' + 1 }}", "fails on this conversation: TypeError"),
        ("{{ messages.append(1) }}", "refuses this conversation: access to attribute 'append'"),
        ("{{ ''.__class__.__mro__ }}", "refuses this conversation: access to attribute '__class__'"),
        ("{% set n = namespace() %}{% set n.__x__ = 1 %}", "underscore"),
        ("{{ namespace(_x=1) }}", "underscore"),
    ],
)
def test_what_goes_wrong_in_a_template_is_one_line(ours, source, message):
    with pytest.raises(ValueError, match=message) as raised:
        ours.chat(TALK, chat_template=source)
    assert "\n" not in str(raised.value)


def test_a_namespace_may_hold_self_and_the_time_is_now(made):
    ours, theirs = made
    source = "{% set n = namespace(self=1) %}{{ n.self }}{{ strftime_now('%Y-%m-%d') }}"
    assert ours.chat(TALK, chat_template=source) == theirs.apply_chat_template(TALK, chat_template=source, tokenize=False)


# -- which template ------------------------------------------------------------------------------------------------------


def test_templates_come_from_files_before_the_config(tmp_path):
    from transformers import AutoTokenizer

    folder = spellings.save(spellings.words(), tmp_path, chat_template="config{{ messages[0].content }}")

    def both(**options):
        found = Tokenizer(folder).chat(TALK, **options)
        assert found == AutoTokenizer.from_pretrained(folder).apply_chat_template(TALK, tokenize=False, **options)
        return found

    assert both() == "configHi"
    (folder / "chat_template.jinja").write_text("file{{ messages[0].content }}\n")
    assert both() == "fileHi"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools{{ tools | length }}")
    assert both(tools=TOOLS) == "tools2"
    assert both(chat_template="tool_use", tools=TOOLS) == "tools2"
    assert both() == "fileHi"
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"several chat templates and no default.*'tool_use'"):
        Tokenizer(folder).chat(TALK)


def test_a_processor_s_template_is_the_last_resort(tmp_path):
    folder = spellings.save(spellings.words(), tmp_path)
    with pytest.raises(ValueError, match="has no chat template; give a prompt to generate"):
        Tokenizer(folder).chat(TALK)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "processor"}))
    assert Tokenizer(folder).chat(TALK) == "processor"
    (folder / "tokenizer_config.json").write_text('{"chat_template": 7}')
    with pytest.raises(ValueError, match="neither a text nor a list"):
        Tokenizer(folder)
