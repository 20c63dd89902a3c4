"""A completion as the engine lets it grow, without a device."""

from collections.abc import Sequence as Tokens

from jaxtp import CompletionOutput, SamplingParams
from jaxtp.engine.detokenizer import Arrival, Detokenizer
from jaxtp.engine.request import Request
from jaxtp.engine.sequence import Sequence
from jaxtp.text import Tokenizer


class Completion:
    """Of a prompt, with so many tokens at most. `told`: the texts that a listener was told, joined."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], params: SamplingParams, *, most: int, show: bool) -> None:
        self.output, self.told = CompletionOutput(0, "", []), ""
        request = Request("0", prompt, params, stream=show, listener=self._listen, outputs=[self.output])
        self._sequence = Sequence(request, 0, order=(0,), max_tokens=most, stop_ids=tuple(params.stop_token_ids))
        self._detokenizer = Detokenizer(tokenizer, self._stopped)

    def take(self, tokens: Tokens[int]) -> None:
        """What one step made."""
        for token in tokens:
            self._sequence.take(token)
        self._detokenizer.put([Arrival(self._sequence, [*tokens], finish_reason=self._sequence.finish_reason)])

    def _listen(self, request: Request, updates: list) -> None:
        self.told += "".join(update.text for update in updates)

    def _stopped(self, sequence: Sequence) -> None:
        sequence.finish_reason = "stop"
