"""The training loop: batches in, checkpoints and numbers out; what stops it, and how it goes on."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxtp.checkpoint import hf
from jaxtp.config import ModelConfig
from jaxtp.generate import LLM, SamplingParams
from jaxtp.log import logger, show
from jaxtp.mesh import make_mesh
from jaxtp.model import Llama
from jaxtp.model.stacked import Params, Stacked
from jaxtp.parallel.circulate import staged
from jaxtp.parallel.pipeline import Pipeline
from jaxtp.parallel.stages import Stages
from jaxtp.planner.work import Split, check_rows
from jaxtp.sharding import Rules, check_layout
from jaxtp.text import Tokenizer
from jaxtp.train.checkpoints import Checkpoints, last_meta
from jaxtp.train.config import TrainConfig, model_config, parse, plain
from jaxtp.train.data import Batches, Corpus, Windows, check_vocabulary, read
from jaxtp.train.lora import Adapters
from jaxtp.train.loss import Batch
from jaxtp.train.meter import Meter, Profile
from jaxtp.train.optim import schedule, transformation
from jaxtp.train.report import Report
from jaxtp.train.step import Metrics, State, Trainer
from jaxtp.train.tokenizer import train_tokenizer

PREEMPTED = 75  # the exit code after SIGTERM: saved, start me again (EX_TEMPFAIL)
NON_FINITE = 76  # the exit code of a run that diverged


class Diverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Preempted(RuntimeError):
    """SIGTERM came; the state is saved."""


@dataclass(frozen=True)
class Result:
    """What a run came to. losses: (step, nats per token) of training, validation: the same of validation."""

    folder: Path
    steps: int
    losses: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    skipped: int
    goodput: float


class Run:
    """A training run, set up: everything is checked and loaded, nothing trained yet."""

    def __init__(self, config: TrainConfig) -> None:
        """Raises FileNotFoundError or ValueError for whatever cannot be, before any weight is made."""
        show()
        self.began = time.perf_counter()
        self.config, self.folder = config, Path(config.folder)
        parallel, data = config.parallel, config.data
        self._profile = Profile(config.log.profile_steps, self.folder)
        across = parallel.tp_across_nodes
        self.mesh = make_mesh(dp=parallel.dp, pp=parallel.pp, tp=parallel.tp, tp_across_nodes=across)
        check_rows(data.batch_size, parallel.accumulate, self.mesh.shape["dp"])
        start = hf.resolve(config.model.start) if config.model.start else None
        self.tokenizer = self._tokenizer(start)
        eos = self.tokenizer.eos_id if self.tokenizer else None
        corpus = read(data.train, self.tokenizer, kind=data.kind, key=data.text_key, eos=eos)
        self.corpora = self._split(corpus, eos)
        size = self.tokenizer.size if self.tokenizer else int(corpus.tokens.max()) + 1
        self.model_config = ModelConfig.from_hf(start) if start else model_config(config, vocab_size=size, eos=eos)
        self._check_lengths()
        for part in self.corpora.values():
            check_vocabulary(part, self.model_config.vocab_size)
        rules = Rules().sequence_parallel() if parallel.sequence_parallel else Rules()
        rules = rules.pipeline_parallel() if parallel.pp > 1 else rules
        check_layout(self.model_config, parallel.tp, rules)
        self.stacked = Stacked(self._model(rules, config.model.dtype))
        self.trainer = _trainer(config, self.stacked)
        self.batches = {name: self._batches(part, name) for name, part in self.corpora.items()}
        self._rules, self._start = rules, start

    # -- setting up ----------------------------------------------------------------------------------------------------

    def _tokenizer(self, start: Path | None) -> Tokenizer | None:
        data = self.config.data
        if not data.train:
            raise ValueError("data.train names no file to train on")
        folder = Path(data.tokenizer) if data.tokenizer else start
        if data.tokenizer and data.train_tokenizer:
            if jax.process_index() == 0 and not Path(data.tokenizer, "tokenizer.json").exists():
                train_tokenizer(data.train, data.tokenizer, vocab_size=data.train_tokenizer)
                logger.info("trained a tokenizer of %d tokens: %s", data.train_tokenizer, data.tokenizer)
            if jax.process_count() > 1:  # the others read what the first has written
                multihost_utils.sync_global_devices("tokenizer")
        return Tokenizer(hf.resolve(folder)) if folder else None

    def _split(self, corpus: Corpus, eos: int | None) -> dict[str, Corpus]:
        data = self.config.data
        if data.validation:
            other = read(data.validation, self.tokenizer, kind=data.kind, key=data.text_key, eos=eos)
            return {"train": corpus, "validation": other}
        if data.validation_share:
            first, last = corpus.split(data.validation_share)
            return {"train": first, "validation": last}
        return {"train": corpus}

    def _check_lengths(self) -> None:
        length, most = self.config.data.sequence_length, self.model_config.max_position_embeddings
        if length > most:
            raise ValueError(f"data.sequence_length={length} exceeds the model's max_position_embeddings={most}")

    def _model(self, rules: Rules, dtype: str) -> Llama:
        return Llama(self.model_config, mesh=self.mesh, rules=rules, dtype=dtype, kernel=self.config.model.kernel)

    def _batches(self, corpus: Corpus, name: str) -> Batches:
        data, parallel = self.config.data, self.config.parallel
        pack = data.pack or corpus.learn is not None
        return Batches(
            Windows(corpus, data.sequence_length, pack=pack),
            data.batch_size,
            parallel.accumulate,
            self.config.seed,
            self.stacked.layout.sharding(None, "batch", "tokens"),
            segments=pack or len(corpus.bounds) > 2,
        )

    def first_state(self) -> State:
        """The state before the first step: new adapters, weights of the checkpoint it starts from, or new ones."""
        adapters = self.trainer.adapters
        return self.trainer.begin(adapters.begin(self.config.seed) if adapters else self._weights("float32"))

    def frozen(self) -> Params | None:
        """The weights beside adapters."""
        return self.trainer.freeze(self._weights(self.config.model.dtype)) if self.trainer.adapters else None

    def _weights(self, dtype: str) -> Params:
        pipeline = self.trainer.pipeline  # each of its ranks reads, or makes, its own layers
        layout = staged(pipeline.stages, rules=self._rules) if pipeline else {"rules": self._rules}
        place: dict[str, Any] = {"mesh": self.mesh, "dtype": dtype, **layout}
        if self._start:
            return self.stacked.stack(Llama(self.model_config, **place).load(self._start, progress=True))
        return self.stacked.stack(Llama.random(self.model_config, **place, seed=self.config.seed))

    @property
    def split(self) -> Split:
        """The layout, in the planner's terms."""
        its, axes = self.config.parallel, self.mesh.shape
        return Split(
            dp=axes["dp"], pp=axes["pp"], tp=axes["tp"], sequence_parallel=its.sequence_parallel, zero=its.zero,
            microbatches=its.accumulate, schedule=its.schedule, chunks=its.chunks, remat=its.remat,
        )  # fmt: skip

    def step(self) -> Any:
        """The jitted step (state, batch, frozen) -> (state, metrics)."""
        return self.trainer.jitted(options=self.config.parallel.xla_flags)

    # -- running -------------------------------------------------------------------------------------------------------

    def train(self) -> Result:
        """Trains to the last step, from the last checkpoint where there is one.

        Raises Preempted after SIGTERM (the state is saved), and Diverged.
        """
        config = self.config
        saved = Checkpoints(
            self.folder / "checkpoints", self.trainer, keep=config.checkpoints.keep, best=config.checkpoints.best
        )
        if jax.process_count() > 1:
            seen = multihost_utils.process_allgather(np.int32(max(saved.steps(), default=0)))
            if len(set(seen.tolist())) > 1:
                raise ValueError(
                    f"the nodes see different checkpoints in {saved.folder} (the last is of step {', '.join(map(str, seen))}); "
                    "it must be a folder that all of them share"
                )
        found = saved.restore()
        state, meta = found if found else (self.first_state(), {})
        frozen = self.frozen()
        first = int(state.step)
        if pipeline := self.trainer.pipeline:
            bubble = pipeline.schedule(config.parallel.accumulate).bubble
            logger.info("pipeline: %s; bubble %.1f%%", pipeline.stages.told(), 100 * bubble)
        if meta and (meta["seed"], meta["rows"]) != (config.seed, config.data.batch_size):
            logger.warning(
                "the run began with seed %s and %s rows a step: its data goes on otherwise", meta["seed"], meta["rows"]
            )
        if first:
            logger.info("going on from step %d", first)
        with jax.set_mesh(self.mesh):
            step = self.step()
            evaluate = jax.jit(self.trainer.evaluate)
            with self._report(first) as report, _terminated() as stop, contextlib.closing(saved):
                return self._loop(state, frozen, step, evaluate, saved, report, stop)

    def _loop(
        self,
        state: State,
        frozen: Params | None,
        step: Callable[[State, Batch, Params | None], tuple[State, Metrics]],
        evaluate: Callable[..., tuple[jax.Array, jax.Array]],
        saved: Checkpoints,
        report: Report,
        stop: Callable[[int], bool],
    ) -> Result:
        config, first = self.config, int(state.step)
        losses: list[tuple[int, float]] = []
        validation: list[tuple[int, float]] = []
        rate = schedule(config.optimizer, config.steps)
        data = config.data
        meter = Meter(
            self.model_config, self.mesh, rows=data.batch_size, length=data.sequence_length, frozen=frozen is not None
        )
        bad, productive = 0, 0.0
        profile = self._profile
        batches = self.batches["train"].from_step(first)
        for number in range(first, config.steps):
            profile.before(number)
            start = time.perf_counter()
            state, metrics = step(state, next(batches), frozen)
            loss = float(metrics.nats)  # waits for the step
            took = time.perf_counter() - start
            last, stopping = number + 1 == config.steps, stop(number)
            profile.after(number, last=last or stopping)
            if number > first:  # the first one compiles
                productive += took
                meter.add(took)
            bad = 0 if bool(metrics.finite) else bad + 1
            if bad:
                logger.warning("step %d: the loss or gradient is not finite; left out (%d in a row)", number + 1, bad)
            if bad >= config.max_nonfinite:
                raise Diverged(
                    f"{bad} steps in a row up to step {number + 1} had a loss or gradient that is not finite; the last "
                    f"checkpoint is of step {max(saved.steps(), default=0)}. A lower learning rate or a longer warm-up helps"
                )
            losses.append((number + 1, loss))
            if last or (number + 1) % config.log.every == 0:
                values = {
                    "loss": float(metrics.loss), "nats": loss, "grad_norm": float(metrics.norm),
                    "learning_rate": float(rate(number)), **meter.take(),
                }  # fmt: skip
                report.numbers(number + 1, values, note=_note(values))
            else:
                report.step(number + 1)
            best = None
            if "validation" in self.batches and (last or (number + 1) % config.validate_every == 0):
                best = self._validate(state, frozen, evaluate, number + 1, report)
                validation.append((number + 1, best))
            if config.log.sample_every and (number + 1) % config.log.sample_every == 0:
                self._sample(state, frozen, number + 1, report)
            every = config.checkpoints.every
            if last or stopping or (every and (number + 1) % every == 0):
                saved.save(state, self._meta(), loss=best)
            if stopping and not last:
                saved.wait()
                raise Preempted(f"SIGTERM: saved at step {number + 1} in {saved.folder}; the same command goes on from there")
        saved.wait()
        goodput = productive / max(time.perf_counter() - self.began, 1e-9)
        logger.info("done: %d steps, %d left out; goodput %.0f%%", config.steps, int(state.skipped), 100 * goodput)
        return Result(self.folder, config.steps, losses, validation, int(state.skipped), goodput)

    def _meta(self) -> dict[str, Any]:
        """What a checkpoint tells beside its arrays."""
        return {
            "model": self.model_config.to_hf(),
            "lora": self.trainer.adapters.lora.told() if self.trainer.adapters else {},
            "seed": self.config.seed,
            "rows": self.config.data.batch_size,
            "config": plain(self.config),
        }

    def _report(self, first: int) -> Report:
        log = self.config.log
        return Report(
            self.folder,
            steps=self.config.steps,
            start=first,
            tensorboard=log.tensorboard,
            wandb=log.wandb,
            settings=plain(self.config),
        )

    def _validate(self, state: State, frozen: Params | None, evaluate: Any, number: int, report: Report) -> float:
        """Nats per token over the whole validation set, and per character where it is text."""
        sums = [evaluate(state.params, batch, frozen) for batch in self.batches["validation"].once()]
        nats, tokens = (float(sum(np.float64(s[i]) for s in sums)) for i in range(2))
        values = {"validation_nats": nats / max(tokens, 1.0)}
        corpus = self.corpora["validation"]
        if corpus.characters:
            # rows leave out the few tokens that fill no sample: the characters of those that they hold
            values["validation_nats_per_character"] = nats / (corpus.characters * tokens / len(corpus))
        note = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
        report.numbers(number, values, note=note)
        return values["validation_nats"]

    def _sample(self, state: State, frozen: Params | None, number: int, report: Report) -> None:
        log = self.config.log
        model = self.trainer.model(state, frozen, dtype=self.stacked.layout.dtype, staged=True)
        llm = LLM(model, tokenizer=self.tokenizer, progress=False)
        prompt: Any = log.sample_prompt if log.sample_prompt and self.tokenizer else [self.model_config.bos_token_id or 0]
        made = llm.generate(prompt, SamplingParams(temperature=0.8, max_tokens=log.sample_tokens, seed=0))[0]
        report.text(number, (made.prompt or "") + (made.outputs[0].text or str(made.outputs[0].token_ids)))


@contextlib.contextmanager
def _terminated() -> Iterator[Callable[[int], bool]]:
    """Whether SIGTERM came: asked after every step, answered alike on all processes."""
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    came: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    except ValueError:  # not in the main thread: nobody can tell us
        yield lambda step: False
        return
    try:
        yield lambda step: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


def _note(values: dict[str, float]) -> str:
    shown = [f"loss {values['nats']:.4f}", f"lr {values['learning_rate']:.2e}", f"norm {values['grad_norm']:.2f}"]
    if "tokens_per_second" in values:
        shown.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in values:
        shown.append(f"MFU {values['mfu']:.1%}")
    return ", ".join(shown)


def _trainer(config: TrainConfig, stacked: Stacked) -> Trainer:
    adapters = Adapters(stacked, config.lora) if config.lora.rank else None
    pipeline, mesh, split = None, stacked.layout.mesh, config.parallel
    if mesh.shape["pp"] > 1:
        layers, sizes = stacked.config.num_layers, split.layers_per_stage
        stages = Stages.split(layers, ranks=mesh.shape["pp"], chunks=split.chunks, sizes=sizes)
        if config.optimizer.name == "adafactor" and not stages.even:
            raise ValueError(f"adafactor clips by the RMS of whole stacks, in which {stages.told()}; use adamw or muon")
        pipeline = Pipeline(mesh, stages, split.schedule)
    return Trainer(
        stacked,
        transformation(config.optimizer, config.steps, (adapters or stacked).specs()),
        adapters,
        pipeline,
        zero=config.parallel.zero,
        remat=config.parallel.remat,
        clip_norm=config.optimizer.clip_norm,
        z_loss=config.z_loss,
    )


def train(config: TrainConfig) -> Result:
    """Trains as the config says."""
    return Run(config).train()


def export(
    run_folder: str | Path, folder: str | Path, *, dtype: str | None = None, step: int | None = None, overwrite: bool = False
) -> None:
    """Writes a checkpoint of a run (default the last) as a Hugging Face folder, with its tokenizer.

    dtype: of the weights written, default the one that the run computed in. overwrite: replace the model in a folder that is
    not empty. Raises FileExistsError for such a folder without, and ValueError where there is no checkpoint that can be read.
    """
    run_folder, folder = Path(run_folder), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise FileExistsError(f"{folder} is there and not empty; give a new folder, or --overwrite (overwrite=True)")
    meta = last_meta(run_folder / "checkpoints", step)
    config = parse(meta["config"], where=f"the config kept in {run_folder}")
    model_config = ModelConfig.from_hf(meta["model"])
    stacked = Stacked(Llama(model_config, mesh=make_mesh()))
    trainer = _trainer(config, stacked)
    saved = Checkpoints(run_folder / "checkpoints", trainer)
    found = saved.restore(step)
    saved.close()
    if found is None:
        raise ValueError(f"{run_folder} has no checkpoint that can be read")
    frozen = stacked.stack(Llama.from_pretrained(config.model.start or "", dtype="float32")) if trainer.adapters else None
    dtype = dtype or config.model.dtype
    model = trainer.model(found[0], frozen, dtype=jnp.dtype(dtype))
    model.source = config.data.tokenizer or config.model.start
    model.save_pretrained(folder)
    logger.info("wrote step %d of %s to %s, in %s", int(found[0].step), run_folder, folder, dtype)
