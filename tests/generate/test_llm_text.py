"""What an LLM does with text beyond its tokens: stop strings that cannot come, what ends a text, and chats in vLLM's words."""

import logging

import pytest
import tiny

from jaxtp import LLM, SamplingParams

TEMPLATE = """{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{{- m.role }}: {{ m.content }}|{% endfor %}{% if tools %}{{ tools | length }}{% endif %}{{ mood }}
{%- if add_generation_prompt %}assistant: {% endif %}"""
TALK = [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}]}]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return LLM(tiny.checkpoint(tmp_path_factory.mktemp("text") / "model", eos_token_ids=()), progress=False)


def one(llm, **params):
    return llm.generate([[5]], SamplingParams(max_tokens=3, logit_bias={2: 100}, **params))[0].outputs[0]


def test_the_tokenizer_s_end_of_sequence_ends_texts_where_no_config_names_one(llm):
    assert llm.eos == (2,)
    assert (one(llm).token_ids, one(llm).finish_reason) == ([2], "stop")


def test_a_stop_string_that_no_text_shows_is_said_once(llm, caplog):
    with caplog.at_level(logging.WARNING, "jaxtp"):
        for _ in range(2):
            assert one(llm, stop=["</s>", "no"], ignore_eos=True).finish_reason == "length"
    (said,) = [record.getMessage() for record in caplog.records]
    assert "'</s>' will not be found" in said
    assert "skip_special_tokens=False" in said
    assert "stop_token_ids=[2]" in said
    assert one(llm, stop="</s>", ignore_eos=True, skip_special_tokens=False).stop_reason == "</s>"


def test_a_prompt_of_half_a_character_is_refused(llm):
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        llm.generate("a\ud83d")


def test_a_chat_takes_what_vllm_s_takes(llm):
    def prompt(messages=TALK, **options):
        (request,) = llm.chat(messages, SamplingParams(max_tokens=1), chat_template=TEMPLATE, **options)
        return llm.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)

    line = "<unk>"  # the newline between parts, which this tokenizer does not have
    assert prompt() == f"user: Hi{line}you|assistant: "
    assert prompt(add_generation_prompt=False, chat_template_kwargs={"mood": "sad"}) == f"user: Hi{line}you|sad"
    assert prompt(tools=[{"name": "a"}, {"name": "b"}]) == f"user: Hi{line}you|2assistant: "
    assert prompt(add_generation_prompt=False, continue_final_message=True) == f"user: Hi{line}you"
    with pytest.raises(ValueError, match="the chat template refuses this conversation: System role not supported"):
        prompt([{"role": "system", "content": "be brief"}])
    with pytest.raises(ValueError, match="a part of type 'image_url'; this model reads text alone"):
        prompt([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
