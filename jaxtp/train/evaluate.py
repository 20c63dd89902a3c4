"""How well a model predicts some data: a run's checkpoint, or any model, on any mesh."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxtp import checks, compilation_cache
from jaxtp.checkpoint import hf
from jaxtp.config import ModelConfig
from jaxtp.generate.load import tokenizer_of
from jaxtp.log import console, interactive, show
from jaxtp.mesh import make_mesh
from jaxtp.model import Llama
from jaxtp.model.stacked import Params, Stacked
from jaxtp.planner.work import check_rows
from jaxtp.text import Tokenizer
from jaxtp.train.build import context_of, rules_of, trainer_of, weights_of
from jaxtp.train.checkpoints import Checkpoints, chosen
from jaxtp.train.config import Model, Parallel, TrainConfig, parse
from jaxtp.train.corpus import Format
from jaxtp.train.data import Batches, Corpus, check_vocabulary, read
from jaxtp.train.records import TrainOn
from jaxtp.train.step import Trainer
from jaxtp.train.validation import Spans, score

LONGEST = 2048  # the default sequence length of models that take longer ones
ROWS = 8  # of a microbatch on each group of dp, by default


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of some data.

    nats: the mean of -log p over `tokens`, those that count: all but the first of each document, of conversations what the
    assistant says. nats_per_character and bits_per_byte (of UTF-8): where the data is text, else None. step: of a run.
    """

    model: str
    step: int | None
    data: tuple[str, ...]
    sequence_length: int
    stride: int
    documents: int
    tokens: int
    nats: float
    perplexity: float
    nats_per_character: float | None
    bits_per_byte: float | None

    def print(self) -> None:
        """One figure a line."""
        documents = f"{self.documents:,} document{'s' * (self.documents != 1)}"
        print(f"nats per token:      {self.nats:.4f}  ({self.tokens:,} tokens of {documents})")
        print(f"perplexity:          {self.perplexity:.3f}")
        if self.nats_per_character is not None:
            print(f"nats per character:  {self.nats_per_character:.4f}")
        if self.bits_per_byte is not None:
            print(f"bits per byte:       {self.bits_per_byte:.4f}")

    def save(self, path: str | Path) -> None:
        """Writes the figures as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")


def evaluate(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    *,
    step: int | None = None,
    best: bool = False,
    lora: str | Path | None = None,
    tokenizer: str | Path | None = None,
    kind: Format = "auto",
    text_key: str = "text",
    train_on: TrainOn | None = None,
    sequence_length: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    data_parallel_size: int = 1,
    context_parallel_size: int = 1,
    sequence_parallel: bool = False,
    revision: str | None = None,
    progress: bool = True,
) -> Evaluation:
    """The loss of a model on data, each token counted once, in windows as `validation.Spans` cuts documents.

    model: the folder of a training run (its last checkpoint, that of `step`, or the `best` one; it is restored with what the
    optimiser keeps), or a checkpoint folder, a hub id, or "demo", with an adapter in PEFT's format (`lora`) merged into it.
    data, kind, text_key, train_on: as `train` reads them; what it would learn counts (by default what the run did).
    sequence_length: of the windows, default the run's, or what the model takes, at most 2048. stride: between windows, default
    their length; less gives tokens more to see, for more work. batch_size: rows at once on all devices, on which no figure
    depends. dtype: of the computation, default the run's or the checkpoint's.
    Raises FileNotFoundError or ValueError for what cannot be.
    """
    if progress:
        show()
    compilation_cache.use()
    if kind not in get_args(Format):
        raise ValueError(f"kind={kind!r} is none of {', '.join(get_args(Format))}")
    source = _source(Path(model), step, best, lora, revision)
    split = Parallel(
        dp=data_parallel_size, pp=pipeline_parallel_size, cp=context_parallel_size, tp=tensor_parallel_size, zero=0,
        accumulate=pipeline_parallel_size, sequence_parallel=sequence_parallel,
    )  # fmt: skip
    rows = batch_size or ROWS * split.dp * split.accumulate
    check_rows(rows, split.accumulate, dp=split.dp)
    config, kept = source.model, source.config
    kept = replace(kept, parallel=split, data=replace(kept.data, batch_size=rows, sequence_length=source.length))
    length = kept.data.sequence_length if sequence_length is None else sequence_length
    checks.whole("sequence_length", length, least=1)
    config.check_length("sequence_length", length)
    rules = rules_of(split, config)
    words = tokenizer_of(tokenizer or kept.tokenizer or kept.model.start, asked=tokenizer is not None)
    paths = [data] if isinstance(data, str | Path) else list(data)
    corpus = read(
        paths, words, kind=kind, key=text_key, eos=words.eos_id if words else None, train_on=train_on or kept.data.train_on
    )
    check_vocabulary(corpus, config.vocab_size)
    spans = Spans(corpus, length, stride=stride)

    mesh, context = make_mesh(dp=split.dp, pp=split.pp, cp=split.cp, tp=split.tp), context_of(split)
    dtype = (None if dtype in (None, "auto") else dtype) or source.dtype
    stacked = Stacked(Llama(config, mesh=mesh, rules=rules, dtype=dtype, kernel=kept.model.kernel, context=context))
    trainer = trainer_of(kept, stacked)
    params, frozen, number = source.weights(trainer, dtype, progress)
    place = stacked.layout.sharding(None, "batch", "tokens")
    batches = Batches(spans, rows, split.accumulate, 0, place, segments=spans.shared, context=context)
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with (
        jax.set_mesh(mesh),
        Progress(*columns, disable=not (progress and interactive()), transient=True, console=console) as bar,
    ):
        task = bar.add_task("", total=-(-len(spans) // rows))
        measure = jax.jit(trainer.evaluate)
        found = score(lambda batch: measure(params, batch, frozen), batches, seen=lambda: bar.advance(task))
    if not found.tokens:
        raise ValueError(f"nothing in {', '.join(map(str, paths))} counts: no token is one to learn")
    each = found.nats_per_character
    return Evaluation(
        model=str(model),
        step=number,
        data=tuple(map(str, paths)),
        sequence_length=length,
        stride=length if stride is None else stride,
        documents=len(corpus.bounds) - 1,
        tokens=round(found.tokens),
        nats=found.nats_per_token,
        perplexity=math.exp(found.nats_per_token),
        nats_per_character=each,
        bits_per_byte=each / math.log(2) / _width(corpus, words) if each is not None and words else None,
    )


@dataclass(frozen=True)
class _Source:
    """Where weights come from: the folder of a run, or of a checkpoint, which may have an adapter with it."""

    folder: Path
    config: TrainConfig
    model: ModelConfig
    step: int | None  # of a run; None: the last
    lora: str | Path | None
    run: bool

    @property
    def length(self) -> int:
        """The default length of windows."""
        return self.config.data.sequence_length if self.run else min(self.model.context, LONGEST)

    @property
    def dtype(self) -> str:
        """The default dtype of the computation."""
        return self.config.model.dtype if self.run else self.model.dtype or "float32"

    def weights(self, trainer: Trainer, dtype: str, progress: bool) -> tuple[Params, Params | None, int | None]:
        """(what is trained, the frozen weights beside it, the step): arguments of `Trainer.evaluate`."""
        start = self.config.model.start
        if not self.run:
            return weights_of(trainer, self.folder, dtype=dtype, lora=self.lora, progress=progress), None, None
        with contextlib.closing(Checkpoints(self.folder / "checkpoints", trainer)) as saved:
            found = saved.restore(self.step)
        if found is None:
            raise ValueError(f"{self.folder} has no checkpoint that can be read")
        frozen = weights_of(trainer, hf.resolve(start), dtype=dtype, progress=progress) if trainer.adapters and start else None
        return found[0].params, trainer.freeze(frozen) if frozen else None, int(found[0].step)


def _source(model: Path, step: int | None, best: bool, lora: str | Path | None, revision: str | None) -> _Source:
    if (model / "checkpoints").is_dir():
        if lora is not None:
            raise ValueError(f"{model} is a run, whose weights are its own; lora={str(lora)!r} goes with a model")
        number, meta = chosen(model / "checkpoints", step=step, best=best)
        config = replace(parse(meta["config"], where=f"the config kept in {model}"), folder=str(model))  # it may have moved
        return _Source(model, config, ModelConfig.from_hf(meta["model"]), number if best else step, None, run=True)
    if best or step is not None:
        raise ValueError(f"{model} is not the folder of a run: it has no checkpoints of which to choose")
    folder = hf.resolve(str(model), revision=revision)
    config = TrainConfig(folder="", model=Model(start=str(folder)))
    model_config = replace(hf.config_of(folder), schemes=None)  # weights in few bits are read as what they stand for
    return _Source(folder, config, model_config, None, lora, run=False)


def _width(corpus: Corpus, tokenizer: Tokenizer) -> float:
    """Bytes of UTF-8 for each character of a text."""
    texts = [tokenizer.decode(corpus.tokens[start:end].tolist()) for start, end in itertools.pairwise(corpus.bounds)]
    return sum(len(text.encode(errors="replace")) for text in texts) / max(sum(map(len, texts)), 1)
