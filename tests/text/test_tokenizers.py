"""A folder's tokenizer is the one that transformers makes of it, whatever the folder says; and transformers is not loaded."""

import json
import random
import subprocess
import sys

import pytest
import spellings
import tiny
from tokenizers import normalizers, pre_tokenizers, processors

import jaxtp.checkpoint.hf as hf
import jaxtp.text.folder
from jaxtp.text import Tokenizer

FLAGS = {"lstrip": False, "rstrip": False, "single_word": False}


def added(content, **flags):
    return {"content": content, "normalized": False, "special": True, **FLAGS, **flags}


def typed(content, **flags):
    return {"__type": "AddedToken", **added(content, **flags)}


def same(folder, seed=0):
    """Compares with transformers: ids, text, special tokens, size."""
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.size == len(theirs)
    assert ours.special == frozenset(theirs.all_special_ids)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    names = [name for name in theirs.get_added_vocab() if name != "<FILL_ME>"] or [""]  # what Code Llama makes two texts of
    rng = random.Random(seed)
    for _ in range(40):
        said = "".join(rng.choice([spellings.text(rng, 12), rng.choice(names), " ", "  a", "1234", "Ｆ é"]) for _ in range(4))
        for special in (True, False):
            ids = ours.encode(said, add_special_tokens=special)
            assert ids == theirs.encode(said, add_special_tokens=special), said
        for skip in (True, False):
            text = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == text
    return ours


@pytest.mark.parametrize("kind", spellings.KINDS)
def test_every_kind_of_tokenizer(tmp_path, kind):
    same(spellings.save(spellings.KINDS[kind](), tmp_path))


def test_the_demo_s_and_a_real_one(stories):
    same(hf.DEMO)
    assert same(stories).bos_id == 1


LLAMA = ["LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "GemmaTokenizer", "PreTrainedTokenizerFast", None]
LEVEL = ["LlamaTokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer", "GPTNeoXTokenizerFast", None]


DECLARED = [
    (kind, declared, model_type)
    for kind, classes in (("llama 2", LLAMA), ("byte level", LEVEL))
    for declared in classes
    for model_type in (None, "llama", "mistral", "qwen2", "qwen3")
    if declared or model_type  # transformers needs one of them
]


@pytest.mark.parametrize(("kind", "declared", "model_type"), DECLARED)
def test_the_class_that_a_folder_declares(tmp_path, kind, declared, model_type):
    backend = spellings.KINDS[kind]()
    if kind == "byte level":  # what a class of transformers does away with
        level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
        backend.normalizer = normalizers.NFKC()
        backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    backend.enable_truncation(7)
    backend.enable_padding(length=20, pad_token="</s>", pad_id=2)
    settings = {"tokenizer_class": declared, "add_bos_token": True, "add_eos_token": True}
    folder = spellings.save(backend, tmp_path, **settings)
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 600}))
    same(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"legacy": True},
        {"legacy": False, "add_prefix_space": False},
        {"add_prefix_space": True, "legacy": None},
        {"added_tokens_decoder": {"1": added("<s>", rstrip=True), "4": added("<new>"), "900": added("far", special=False)}},
        {"bos_token": None, "eos_token": "<|end|>", "unk_token": None},
        {"bos_token": typed("<s>", lstrip=True), "pad_token": "<pad>", "mask_token": typed("<mask>")},
    ],
)
@pytest.mark.parametrize("declared", ["LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "TokenizersBackend"])
def test_settings_of_a_class(tmp_path, declared, settings):
    kind = "byte level" if declared in ("GPT2Tokenizer", "Qwen2Tokenizer") else "llama 2"
    same(spellings.save(spellings.KINDS[kind](), tmp_path, tokenizer_class=declared, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"additional_special_tokens": ["<a>", "<|end|>"]},
        {"extra_special_tokens": ["<a>", "b"]},
        {"extra_special_tokens": {"image_token": "<image>", "audio_token": "<audio>"}},
        {"image_token": "<image>", "eos_token": "nowhere"},
        {"eos_token": "the cat"},
        {
            "added_tokens_decoder": {
                "420": added("<tool>", special=False, normalized=True),
                "421": added("<both>", lstrip=True, rstrip=True),
                "422": added("word", single_word=True, special=False),
            },
            "additional_special_tokens": ["<tool>"],
        },
        {"added_tokens_decoder": {"2": added("</s>", special=False), "3": added("<|end|>", special=False)}},
        {"added_tokens_decoder": {"420": added("<tool>", special=False)}, "eos_token": "<tool>"},
        {"split_special_tokens": True},
        {"clean_up_tokenization_spaces": True},
    ],
)
def test_special_and_added_tokens(tmp_path, settings):
    same(spellings.save(spellings.byte_level(), tmp_path, **settings))


def test_files_of_older_transformers(tmp_path):
    folder = spellings.save(spellings.byte_level(), tmp_path)
    maps = {"eos_token": added("<|end|>", rstrip=True), "pad_token": "<pad>", "additional_special_tokens": ["<x>", "<y>"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(maps))
    (folder / "added_tokens.json").write_text(json.dumps({"<x>": 420, "<more>": 421}))
    assert same(folder).backend.id_to_token(same(folder).eos_id) == "<|end|>"
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").write_text('{"model_type": "llama", "tokenizer_class": "PreTrainedTokenizerFast"}')
    same(folder)


def test_no_text_is_cut_or_filled(tmp_path):
    backend = spellings.byte_level()
    whole = backend.encode("a b c d e f").ids
    backend.enable_truncation(3)
    backend.enable_padding(length=99)
    assert Tokenizer(spellings.save(backend, tmp_path)).encode("a b c d e f") == whole


@pytest.mark.parametrize("text", ["a\ud83d", "\udc80", "é\udfff"])
def test_half_a_character_is_refused(text):
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        Tokenizer(hf.DEMO).encode(text)


# -- folders that cannot be read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", '{"model": 7}', "tokenizer.json is no tokenizer that can be read"),
        ("tokenizer.json", "{", "tokenizer.json is no tokenizer that can be read"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json holds no JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "is no tokenizer that can be read, or "),
        ("special_tokens_map.json", "{", "special_tokens_map.json is not valid JSON"),
        ("chat_template.jinja", b"\xff\xfe\0", "chat_template.jinja is UTF-16"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    tiny.byte_tokenizer(tmp_path, 128)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as raised:
        Tokenizer(tmp_path)
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def sentences(folder):
    """A SentencePiece model, as a folder without tokenizer.json has it."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    (folder / "text.txt").write_text("hello world, the cat sat on the mat\n" * 50)
    trainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_a_folder_without_tokenizer_json(tmp_path, monkeypatch):
    folder = sentences(tmp_path)
    ours = same(folder)
    grows = ours.growing(ours.encode("hello"))
    assert grows.add(ours.encode("hello wörld 😀")[len(ours.encode("hello")) :], last=True) == " wörld 😀"
    there = jaxtp.text.folder.importlib.util.find_spec
    for gone in ("transformers", "sentencepiece"):
        monkeypatch.setattr(
            jaxtp.text.folder.importlib.util, "find_spec", lambda name, gone=gone: None if name == gone else there(name)
        )
        with pytest.raises(ValueError, match=rf'has no tokenizer.json; .* pip install "jaxtp\[sentencepiece\]" .*{gone}\)'):
            Tokenizer(folder)


def test_a_folder_without_anything(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer \(tokenizer.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=str(tmp_path)) as raised:
        Tokenizer(tmp_path)
    assert "\n" not in str(raised.value)


# -- what is imported ----------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, types
from pathlib import Path
package = types.ModuleType("jaxtp")  # without its __init__, which imports all rooms
package.__path__ = [sys.argv[1]]
sys.modules["jaxtp"] = package
from jaxtp.text import Tokenizer
tokenizer = Tokenizer(Path(sys.argv[1], "demo"))
ids = tokenizer.encode("To be")
text = tokenizer.growing(ids).add(ids, last=True)
print("jinja2" in sys.modules, text)
tokenizer.chat([{"role": "user", "content": "x"}], chat_template="{{ messages[0].content }}")
heavy = ["transformers", "torch", "sentencepiece", "tiktoken", "jax", "flax", "numpy"]
print("jinja2" in sys.modules, [name for name in heavy if name in sys.modules])
"""


def test_nothing_heavy_is_imported():
    package = str(hf.DEMO.parent)
    done = subprocess.run([sys.executable, "-c", PROGRAM, package], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["False To be", "True []"]
