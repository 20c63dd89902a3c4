"""`jaxtp bench serve`: load on any server with an OpenAI-compatible API."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtp.cli.options import Flag, writable

if TYPE_CHECKING:
    from jaxtp.load import Level, Source

CONCURRENCY = (1, 4, 16)
PROMPTS = 32  # of a level, at least


@dataclass(frozen=True)
class BenchServe:
    """Put load on a server with an OpenAI-compatible API, and report throughput, TTFT, ITL, TPOT and E2E, as vLLM's benchmark
    defines them."""

    url: str = "http://localhost:8000"
    """Where the server is."""
    model: str | None = None
    """What the server calls it; default the first that it lists."""
    api_key: str | None = None
    """Sent as a bearer token."""
    chat: Flag = False
    """Ask /v1/chat/completions instead of /v1/completions."""
    concurrency: tuple[int, ...] = ()
    """Requests at once; several: one level after another (default 1 4 16). With --request-rate one number, the most."""
    request_rate: tuple[float, ...] = ()
    """Instead: requests that arrive a second, at random times (Poisson); several: one level after another."""
    burstiness: float = 1.0
    """With --request-rate: below 1 requests come in bursts, above more evenly."""
    num_prompts: int | None = None
    """Requests of a level; default 4 times the concurrency, and at least 32."""
    warmups: int | None = None
    """Requests before each level that are not counted; default as many as run at once."""
    prompt_tokens: str | None = None
    """Tokens of a prompt, 128 (the default) or a range 64:256."""
    output_tokens: str | None = None
    """Tokens of a completion at most, 64 (the default) or a range; with --dataset and --tokenizer, as long as the answers."""
    tokenizer: Path | None = None
    """Checkpoint folder of the model: prompts are text that is exactly so many tokens. Without it, random token ids."""
    vocab_size: int | None = None
    """Without --tokenizer: random ids are below this; default 256."""
    dataset: Path | None = None
    """JSON file like ShareGPT's, of whose conversations the first messages are sent."""
    ignore_eos: Flag = False
    """Go on after the end-of-sequence token (vLLM's field; not every server has it)."""
    temperature: float = 0.0
    """0: always the likeliest token."""
    seed: int = 0
    """Of lengths, prompts and arrivals."""
    timeout: float = 600.0
    """Seconds after which a request is given up."""
    json: Path | None = None
    """Write the figures there."""
    picture: Path | None = None
    """Write a picture: throughput and latencies against the load."""

    def run(self) -> None:
        """Loads, prints, writes."""
        writable("--json", self.json)
        writable("--picture", self.picture)
        levels = self.levels()
        self._check()
        from jaxtp.load import Endpoint, measure

        known = {field.name for field in dataclasses.fields(Endpoint)}
        endpoint = Endpoint(**{name: value for name, value in vars(self).items() if name in known})
        found = measure(endpoint, self.source(), levels, seed=self.seed)
        found.print()
        if self.json:
            found.save(self.json)
        if self.picture:
            from jaxtp.load.picture import curves

            curves(found).savefig(self.picture, dpi=150)
        for level in found.levels:
            if not level.record["completed"]:
                kind, (_, said) = next(iter(level.errors.items()))
                raise RuntimeError(f"{level.told()}: no request completed; {kind}: {said}")

    def levels(self) -> list[Level]:
        """What is run, in turn. Raises ValueError for flags that contradict each other."""
        from jaxtp.load import Level

        rates = self.request_rate
        if rates and len(self.concurrency) > 1:
            raise ValueError("--request-rate goes with one --concurrency, the most that run at once; each makes levels alone")
        if self.burstiness != 1 and not rates:
            raise ValueError("--burstiness says how requests arrive: it goes with --request-rate")
        of_each: list[tuple[int | None, float]]
        if rates:
            of_each = [(self.concurrency[0] if self.concurrency else None, rate) for rate in rates]
        else:
            of_each = [(several, math.inf) for several in self.concurrency or CONCURRENCY]
        return [
            Level(several, self.num_prompts or max(PROMPTS, 4 * (several or 0)), rate, self.burstiness, self.warmups)
            for several, rate in of_each
        ]

    def source(self) -> Source:
        """Where the prompts come from."""
        from jaxtp import files
        from jaxtp.load import Dataset, Lengths, TextPrompts, TokenPrompts
        from jaxtp.text import Tokenizer

        tokenizer = Tokenizer(files.local(self.tokenizer)) if self.tokenizer else None
        output = Lengths.read(self.output_tokens, "--output-tokens") if self.output_tokens else None
        if self.dataset:
            return Dataset(self.dataset, output=output, tokenizer=tokenizer, chat=self.chat)
        prompt = Lengths.read(self.prompt_tokens or "128", "--prompt-tokens")
        output = output or Lengths(64)
        if tokenizer is None:
            return TokenPrompts(prompt, output, self.vocab_size or 256)
        return TextPrompts(tokenizer, prompt, output, self.chat)

    def _check(self) -> None:
        """Raises ValueError for flags that contradict each other or cannot be."""
        if self.num_prompts is not None and self.num_prompts < 1:
            raise ValueError(f"--num-prompts {self.num_prompts} must be at least 1")
        if self.timeout <= 0:
            raise ValueError(f"--timeout {self.timeout:g} must be more than 0")
        if self.temperature < 0:
            raise ValueError(f"--temperature {self.temperature:g} must be at least 0")
        if self.dataset and self.prompt_tokens:
            raise ValueError("--dataset brings its own prompts; --prompt-tokens is of random ones")
        if self.vocab_size is not None and (self.tokenizer or self.dataset):
            raise ValueError("--vocab-size is of random token ids; with --tokenizer or --dataset text is sent")
        if self.chat and not (self.tokenizer or self.dataset):
            raise ValueError("--chat sends text: --tokenizer FOLDER makes it, or --dataset FILE has it")
