"""Small byte-level BPE tokenizers from text (the training is `tokenizers`'), saved as `transformers` loads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxtp.train.corpus import Format, text_of

BYTES, END = 256, "<|endoftext|>"


def train_tokenizer(
    paths: Sequence[str | Path], folder: str | Path, *, vocab_size: int, kind: Format = "auto", key: str = "text"
) -> Path:
    """Learns a byte-level BPE of `vocab_size` tokens (all 256 bytes and an end-of-text among them) and writes its files.

    From the text of files, records and folders as `corpus.read` takes them. Raises FileNotFoundError for a missing text and
    ValueError for a vocabulary that cannot hold the bytes, and for files that hold no text.
    """
    if vocab_size <= BYTES:
        raise ValueError(f"vocab_size={vocab_size} must be at least {BYTES + 1}: the bytes and {END}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(text_of(paths, kind=kind, key=key), trainer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return folder
