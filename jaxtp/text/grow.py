"""Text that grows token by token.

`tokenizers.decoders.DecodeStream` does not do, as tests/text/test_grow.py shows: behind bytes that are no character it raises
("Invalid prefix encountered"), it has no end at which it gives what is left of a character, and with a prompt that ends inside
one it gives the prompt once more as part of the completion.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any

import tokenizers

_ESCAPE = "[\udc80-\udcff]"  # what stands for a byte of no character (`surrogateescape`) until it is shown as U+FFFD
_ONCE = "jaxtp.escape-once"
codecs.register_error(_ONCE, lambda error: ("\udc80", error.end))  # type: ignore[attr-defined]
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_WINDOW = 8  # pieces that are decoded again for those behind them; also more than the bytes of a character
_ANCHOR = "x"  # a piece that no decoder strips, so that those behind it do not stand at the beginning


class Spelling:
    """How the tokens of a tokenizer are spelled: each is a piece of text or of bytes, and pieces in a row are joined.

    `tokenizers`' decoders are chains of steps. The step that makes characters of bytes (`ByteLevel`, `ByteFallback`) is done
    here, byte by byte; what stands before it in the chain (`Replace`) works on a piece alone, and what stands behind it
    (`joined`) on pieces in a row.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        steps = _steps(json.loads(backend.decoder.__getstate__())) if backend.decoder else []
        kinds = [step["type"] for step in steps]
        at = next((i for i, kind in enumerate(kinds) if kind in ("ByteLevel", "ByteFallback")), len(kinds))
        self._kind = kinds[at] if at < len(kinds) else None
        alone = [i for i in range(at) if self._kind and kinds[i] == "Replace"]
        before = [steps[i] for i in alone]
        after = [step for i, step in enumerate(steps) if i not in (*alone, at)]
        if self._kind == "ByteLevel":  # it joins all that it spells
            after = [{"type": "Fuse"}, *after]
        self._before = _decoder(before) if before else None
        self._joins = _decoder(after) if any(step["type"] != "Fuse" for step in after) else None
        self.plain = bool(steps) and self._joins is None  # pieces in a row are only put together
        self._backend = backend
        self._special = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self._pieces: dict[int, str | bytes | None] = {}

    def piece(self, token: int, *, skip_special_tokens: bool) -> str | bytes | None:
        """A token's text or bytes; None where it has neither: ids beyond the vocabulary, special tokens that are skipped."""
        if token not in self._pieces:
            self._pieces[token] = self._spell(self._backend.id_to_token(token))
        return None if skip_special_tokens and token in self._special else self._pieces[token]

    def _spell(self, name: str | None) -> str | bytes | None:
        if name is None:
            return None
        if self._before is not None:
            name = self._before.decode([name])
        if self._kind == "ByteLevel":
            return bytes(_ALPHABET[c] for c in name) if all(c in _ALPHABET for c in name) else name.encode()
        found = _BYTE.fullmatch(name) if self._kind == "ByteFallback" else None
        return bytes([int(found[1], 16)]) if found else name

    def utf8(self) -> codecs.IncrementalDecoder:
        """What makes characters of bytes. Bytes of none become an escape each (`ByteFallback`), or one for all that could have
        begun a character (`ByteLevel`).
        """
        return codecs.getincrementaldecoder("utf-8")(_ONCE if self._kind == "ByteLevel" else "surrogateescape")

    def joined(self, pieces: Sequence[str]) -> str:
        """The text of pieces in a row, the first of which stands at the beginning."""
        return self._joins.decode(list(pieces)) if self._joins else ("" if self.plain else " ").join(pieces)


class GrowingText:
    """The text of a completion that grows. Each token is decoded a bounded number of times, and text never changes again.

    The text of a completion is what the decoder makes of prompt and completion together, without what it makes of the prompt
    alone: so a word keeps the space before it, and a character that begins in the prompt belongs to the completion if that
    completes it. (What the prompt leaves unfinished otherwise is no part of the completion.) In this the decoder is the
    tokenizer's own but for one thing: a character is there once its bytes are, whatever comes behind. `ByteFallback` itself
    gives up all the characters of a run of bytes for one that is not whole.
    """

    def __init__(self, spelling: Spelling, prompt: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        self._spelling, self._skip = spelling, skip_special_tokens
        self._utf8 = spelling.utf8()
        self.text = ""
        self._owed = 0  # what the decoder will give for the prompt's unfinished character, if nothing completes it
        pieces: list[str | bytes] = []
        for token in reversed(prompt):
            piece = spelling.piece(token, skip_special_tokens=skip_special_tokens)
            if piece:
                pieces.append(piece)
            if len(pieces) > _WINDOW:
                break
        self._context = [_ANCHOR] * (len(pieces) > _WINDOW)  # pieces that stand before what is to come
        self._context += self._characters(pieces[::-1])
        self._shorten()
        unfinished = len(self._utf8.getstate()[0])
        self._owed = min(unfinished, 1) if self._utf8.errors == _ONCE else unfinished

    def add(self, ids: Sequence[int], *, last: bool = False) -> str:
        """The new text; with `last`, also what is left of an unfinished character."""
        found = (self._spelling.piece(token, skip_special_tokens=self._skip) for token in ids)
        pieces = self._characters([piece for piece in found if piece], last=last)
        if not pieces:
            return ""
        if self._spelling.plain:
            new = "".join(pieces)
        else:
            known = self._spelling.joined(self._context)
            self._context += pieces
            new = self._spelling.joined(self._context)[len(known) :]
            self._shorten()
        self.text += new
        return new

    def _shorten(self) -> None:
        """Keeps the context short. What a decoder does at the beginning of a text it has done once there is any text."""
        if self._spelling.plain:
            self._context = []
        elif len(self._context) > _WINDOW and (self._context[0] == _ANCHOR or self._spelling.joined(self._context)):
            self._context = [_ANCHOR, *self._context[1 - _WINDOW :]]

    def _characters(self, pieces: Sequence[str | bytes], *, last: bool = False) -> list[str]:
        """Pieces with characters for bytes; those of an unfinished character wait for the next call."""
        found = []
        for piece in pieces:
            if isinstance(piece, bytes):
                found.append(self._settled(self._utf8.decode(piece)))
            else:
                found += [self._settled(self._utf8.decode(b"", final=True)), piece]
                self._owed = 0
        if last:
            found.append(self._settled(self._utf8.decode(b"", final=True)))
        return [text for text in found if text]

    def _settled(self, text: str) -> str:
        """Characters made of bytes, without what stands for bytes of the prompt."""
        if text and self._owed:
            text, nothing = re.subn(f"^{_ESCAPE}{{1,{self._owed}}}", "", text)
            self._context += [_ANCHOR] * nothing  # it stands before what comes
            self._owed = 0
        return re.sub(_ESCAPE, "\ufffd", text)


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a decoder, those of sequences within sequences in a row."""
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _steps(part)]
    return [decoder]


def _decoder(steps: list[dict[str, Any]]) -> Any:
    """The `tokenizers` decoder of these steps."""
    model = {"type": "BPE", "vocab": {}, "merges": []}
    decoder = {"type": "Sequence", "decoders": steps}
    return tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", "model": model, "decoder": decoder})).decoder


def _alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write for bytes (GPT-2's): those that can be seen, else 256 and on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_ALPHABET = _alphabet()
