"""Small tokenizers of every kind of decoder, random texts for them, and what a completion's text is by definition."""

import json
import random
import re
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxtp.text import Tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]
WORDS = "the cat sat on a mat and said: naïve café, кот и пёс; ขอบคุณครับ 日本語です مرحبا بالعالم हिन्दी 👩‍👩‍👧‍👦 🎉🎉 😀"
ALPHABETS = [
    "abcdefghij XYZ.,!?'-0123456789",
    " \t\n\r  ",
    "ขอบคุณครับผมมีความสุข",
    "مرحبابالعالمًٌٍَُِّ",
    "日本語のテキスト漢字",
    "кошкаи собака",
    "👩‍👩‍👧‍👦🏽🎉😀🇩🇪❤️\u200d\u200b\ufeff",
    "e\u0301a\u0308o\u0302n\u0303\u0327\u0489",
    "\x00\x01\x07\x1b\x7f\x85\u2028\u2029\ufffd▁Ġ#<0x41>",
]


def text(rng: random.Random, longest: int) -> str:
    """Random Unicode: stretches of one alphabet, with a character of anywhere now and then."""
    found = ""
    while len(found) < longest and rng.random() < 0.85:
        if rng.random() < 0.1:
            code = rng.randrange(0x110000)
            found += chr(code) if not 0xD800 <= code < 0xE000 else "\ufffd"
        else:
            letters = rng.choice(ALPHABETS)
            found += "".join(rng.choice(letters) for _ in range(rng.randint(1, 6)))
    return found[:longest]


def save(backend: Backend, folder: Path, **settings) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    base = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**base, **settings}))
    return folder


def byte_fallback(*, strip: bool) -> Backend:
    """As Llama 2's (strip) and Gemma's: words with a metaspace, and bytes for all that is no word."""
    vocab = {name: i for i, name in enumerate(SPECIAL)} | {f"<0x{b:02X}>": len(SPECIAL) + b for b in range(256)}
    for name in ["▁", "▁▁", "▁t", "h", "e", "▁th", "▁the", "a", "c", *map(chr, range(33, 127)), "é", "к", "日"]:
        vocab.setdefault(name, len(vocab))
    merges = [("▁", "▁"), ("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    prepend = [normalizers.Prepend("▁")] if strip else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def byte_level() -> Backend:
    """As GPT-2's, with merges that end inside characters."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([WORDS] * 3, trainer)
    return backend


def metaspace() -> Backend:
    """As T5's: whole characters, unknown ones lost."""
    vocab = {name: i for i, name in enumerate([*SPECIAL, "▁", "▁the", *sorted(set(WORDS) - {" "}), *"bfgjklqvwxyz!?"])}
    backend = Backend(models.BPE(vocab, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(SPECIAL)
    return backend


def word_piece() -> Backend:
    names = [*SPECIAL, *"abcdefghij", *(f"##{c}" for c in "abcdefghij.,!?'é日"), "the", ".", ",", "!", "日", "n", "'", "##'t"]
    backend = Backend(models.WordPiece({name: i for i, name in enumerate(dict.fromkeys(names))}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(SPECIAL)
    return backend


def end_of_word() -> Backend:
    """As GPT-1's: words end with a suffix that becomes a space before the next one."""
    names = [*SPECIAL, *"abcdefghij", *(f"{c}</w>" for c in "abcdefghij.,!?é日")]
    backend = Backend(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    backend.add_special_tokens(SPECIAL)
    return backend


def words() -> Backend:
    """Without a decoder: words with spaces between."""
    names = [*SPECIAL, *"abcdefghij", "the", "日本"]
    backend = Backend(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(SPECIAL)
    return backend


KINDS = {
    "llama 2": lambda: byte_fallback(strip=True),
    "gemma": lambda: byte_fallback(strip=False),
    "byte level": byte_level,
    "metaspace": metaspace,
    "word piece": word_piece,
    "end of word": end_of_word,
    "words": words,
}


def _byte_table() -> dict[str, int]:
    """The byte that each letter of a byte-level token stands for, by the library's own encoding."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    table = {}
    for code in [*range(0x800), *range(0x800, 0x110000, 0x1000)]:
        if not 0xD800 <= code < 0xE000:
            table |= dict(zip(level.pre_tokenize_str(chr(code))[0][0], chr(code).encode(), strict=True))
    never = set(level.alphabet()) - set(table)  # the letters of bytes that UTF-8 does not have
    return table | {letter: ord(letter) for letter in never}


TABLE = _byte_table()


def spelled(tokenizer: Tokenizer, ids: list[int], *, skip: bool) -> bytes:
    """The bytes of tokens in a row."""
    added = tokenizer.backend.get_added_tokens_decoder()
    level, found = "ByteLevel" in str(tokenizer.backend.decoder.__getstate__()), b""
    for token in ids:
        name = tokenizer.backend.id_to_token(token)
        if name is None or (skip and token in added and added[token].special):
            continue
        if level:
            found += bytes(TABLE[c] for c in name)
        elif re.fullmatch("<0x[0-9A-F]{2}>", name):
            found += bytes([int(name[3:5], 16)])
        else:
            found += name.replace("▁", " ").encode()
    return found


def right(tokenizer: Tokenizer, prompt: list[int], completion: list[int], *, skip: bool) -> str:
    """The text of a completion: that of prompt and completion together, without the prompt's.

    Where bytes spell characters: all bytes in a row, decoded at once; from the first character that ends in the completion,
    without what stands for bytes of the prompt that begin no character.
    """
    backend = tokenizer.backend
    kind = str(backend.decoder.__getstate__()) if backend.decoder else ""
    if "Byte" not in kind:
        known = backend.decode(prompt, skip_special_tokens=skip)
        whole = backend.decode(prompt + completion, skip_special_tokens=skip)
        assert whole.startswith(known)
        return whole[len(known) :]
    level = "ByteLevel" in kind

    def read(content):  # a mark for each U+FFFD that is no character of the text
        if level:
            marked = content.replace("\ufffd".encode(), "\ue000".encode()).decode("utf-8", "replace")
            return marked.replace("\ufffd", "\udc80").replace("\ue000", "\ufffd")
        return re.sub("[\udc80-\udcff]", "\udc80", content.decode("utf-8", "surrogateescape"))

    known, whole = read(spelled(tokenizer, prompt, skip=skip)), read(spelled(tokenizer, prompt + completion, skip=skip))
    while not whole.startswith(known):  # its end stood for bytes of a character that the completion ends
        assert known.endswith("\udc80")
        known = known[:-1]
    found = whole[len(known) :]
    if "Strip" in kind and not spelled(tokenizer, prompt, skip=skip):
        found = found.removeprefix(" ")
    return found.replace("\udc80", "\ufffd")
