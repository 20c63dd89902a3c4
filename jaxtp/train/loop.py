"""The training loop: batches in, checkpoints and numbers out; what stops it, and how it goes on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtp import compilation_cache
from jaxtp.checkpoint import hf
from jaxtp.checkpoint.adapters import Adapter
from jaxtp.files import local
from jaxtp.generate import LLM, SamplingParams
from jaxtp.log import logger, show
from jaxtp.mesh import make_mesh
from jaxtp.model import Llama
from jaxtp.model.stacked import Params, Stacked
from jaxtp.parallel.experts import exchange
from jaxtp.planner.work import Split, check_rows
from jaxtp.sharding import Rules
from jaxtp.text import Tokenizer
from jaxtp.train.build import context_of, generating_rules, rules_of, trainer_of, weights_of
from jaxtp.train.checkpoints import Checkpoints
from jaxtp.train.config import TrainConfig, check_places, model_config, plain
from jaxtp.train.data import Batches, Corpus, Windows, check_vocabulary, read
from jaxtp.train.loss import Batch
from jaxtp.train.meter import Meter, Profile
from jaxtp.train.optim import schedule
from jaxtp.train.report import Report
from jaxtp.train.routers import told
from jaxtp.train.state import Metrics, State
from jaxtp.train.stopping import Best, Diverged, Preempted, terminated
from jaxtp.train.tokenizer import train_tokenizer
from jaxtp.train.validation import Spans, score


@dataclass(frozen=True)
class Result:
    """What a run came to. steps: of the last. losses: (step, nats per token) of training, validation: the same of validation.
    best: the lowest of all validations, those before the run went on among them.
    """

    folder: Path
    steps: int
    losses: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    skipped: int
    goodput: float
    best: tuple[int, float] | None = None


class Run:
    """A training run, set up: everything is checked and loaded, nothing trained yet."""

    def __init__(self, config: TrainConfig) -> None:
        """Raises FileNotFoundError or ValueError for whatever cannot be, before any weight is made."""
        show()
        check_places(config)
        compilation_cache.use()
        self.began = time.perf_counter()
        self.config, self.folder = config, local(config.folder)
        parallel, data = config.parallel, config.data
        self._profile = Profile(config.log.profile_steps, self.folder)
        across = parallel.tp_across_nodes
        self.mesh = make_mesh(
            dp=parallel.dp, pp=parallel.pp, cp=parallel.cp, ep=parallel.ep, tp=parallel.tp, tp_across_nodes=across
        )
        check_rows(data.batch_size, parallel.accumulate, dp=self.mesh.shape["dp"], ep=parallel.ep)
        start = hf.resolve(config.model.start) if config.model.start else None
        self.tokenizer = self._tokenizer(start)
        eos = self.tokenizer.eos_id if self.tokenizer else None
        corpus = self._read(data.train)
        self.corpora = self._split(corpus)
        size = self.tokenizer.size if self.tokenizer else int(corpus.tokens.max()) + 1
        found = hf.config_of(start) if start else model_config(config, vocab_size=size, eos=eos)
        if found.schemes and not (config.lora.lora or config.lora.start):
            raise ValueError(
                f"model.start={str(start)!r} holds weights that are quantized ({found.schemes.name}), which no optimizer can "
                "move; adapters are trained beside them (lora.rank=16), or take the checkpoint of 16 bits"
            )
        self.model_config = replace(found, schemes=None)
        self._check_lengths()
        for part in self.corpora.values():
            check_vocabulary(part, self.model_config.vocab_size)
        rules = rules_of(parallel, self.model_config)
        if config.log.sample_every:
            try:
                self._generating = generating_rules(parallel, self.model_config, rules)
            except ValueError as error:
                raise ValueError(
                    f"log.sample_every={config.log.sample_every}: to make text {error}; leave samples out"
                ) from None
        self.stacked = Stacked(self._model(rules, config.model.dtype))
        self._adapter = self._read_adapter()
        self.trainer = trainer_of(self.config, self.stacked)
        self.batches = {name: self._batches(part, name) for name, part in self.corpora.items()}
        self._start = start
        compilation_cache.say()

    # -- setting up ----------------------------------------------------------------------------------------------------

    def _tokenizer(self, start: Path | None) -> Tokenizer | None:
        data = self.config.data
        if not data.train:
            raise ValueError("data.train names no file to train on")
        if (own := self.config.tokenizer) and data.train_tokenizer:
            if jax.process_index() == 0 and not (own / "tokenizer.json").exists():
                train_tokenizer(data.train, own, vocab_size=data.train_tokenizer, kind=data.kind, key=data.text_key)
                logger.info("trained a tokenizer of %d tokens: %s", data.train_tokenizer, own)
            if jax.process_count() > 1:  # the others read what the first has written
                multihost_utils.sync_global_devices("tokenizer")
        return Tokenizer(hf.resolve(folder)) if (folder := own or start) else None

    def _read(self, paths: Sequence[str]) -> Corpus:
        data, eos = self.config.data, self.tokenizer.eos_id if self.tokenizer else None
        return read(paths, self.tokenizer, kind=data.kind, key=data.text_key, eos=eos, train_on=data.train_on)

    def _split(self, corpus: Corpus) -> dict[str, Corpus]:
        data = self.config.data
        if data.validation:
            return {"train": corpus, "validation": self._read(data.validation)}
        if data.validation_share:
            first, last = corpus.split(data.validation_share)
            return {"train": first, "validation": last}
        return {"train": corpus}

    def _read_adapter(self) -> Adapter | None:
        """The adapter to go on from, whose settings become the run's."""
        asked = self.config.lora
        if not asked.start:
            return None
        adapter = Adapter(hf.resolve(asked.start), hf.shapes(self.stacked.model, self.model_config))
        self.config = replace(self.config, lora=asked.started(adapter))
        return adapter

    def _check_lengths(self) -> None:
        self.model_config.check_length("data.sequence_length", self.config.data.sequence_length)

    def _model(self, rules: Rules, dtype: str) -> Llama:
        return Llama(
            self.model_config, mesh=self.mesh, rules=rules, dtype=dtype, kernel=self.config.model.kernel, dispatch=exchange,
            context=context_of(self.config.parallel),
        )  # fmt: skip

    def _batches(self, corpus: Corpus, name: str) -> Batches:
        data, parallel = self.config.data, self.config.parallel
        pack = data.pack or corpus.learn is not None
        if name == "validation":
            windows: Windows = Spans(corpus, data.sequence_length)
        else:
            windows = Windows(corpus, data.sequence_length, pack=pack)
        return Batches(
            windows,
            data.batch_size,
            parallel.accumulate,
            self.config.seed,
            self.stacked.layout.sharding(None, "batch", "tokens"),
            segments=windows.shared if isinstance(windows, Spans) else pack or len(corpus.bounds) > 2,
            context=self.stacked.model.context,
        )

    def first_state(self) -> State:
        """The state before the first step: adapters (those that it starts from, or new ones), weights of the checkpoint that it
        starts from, or new ones.
        """
        adapters = self.trainer.adapters
        if adapters is None:
            return self.trainer.begin(self._weights("float32"))
        return self.trainer.begin(adapters.taken(self._adapter) if self._adapter else adapters.begin(self.config.seed))

    def frozen(self) -> Params | None:
        """The weights beside adapters."""
        return self.trainer.freeze(self._weights(self.config.model.dtype)) if self.trainer.adapters else None

    def _weights(self, dtype: str) -> Params:
        return weights_of(self.trainer, self._start, dtype=dtype, seed=self.config.seed)

    @property
    def split(self) -> Split:
        """The layout, in the planner's terms."""
        its, axes = self.config.parallel, self.mesh.shape
        return Split(
            **axes, sequence_parallel=its.sequence_parallel, zero=its.zero, expert_layout=its.expert_layout,
            expert_dispatch=its.expert_dispatch,
            context_strategy=None if its.context_strategy == "auto" else its.context_strategy,
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
        self._best = Best(**meta.get("best", {}))
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
            with self._report(first) as report, terminated() as stop, contextlib.closing(saved):
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
        stopped = self._best.stops(config.early_stopping)
        for number in range(first, first if stopped else config.steps):
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
                values |= told(metrics.load) if metrics.load else {}
                report.numbers(number + 1, values, note=_note(values))
                if metrics.load:
                    report.experts(number + 1, np.asarray(metrics.load.counts))
            else:
                report.step(number + 1)
            nats, better = None, False
            if "validation" in self.batches and (last or (number + 1) % config.validate_every == 0):
                nats = self._validate(state, frozen, evaluate, number + 1, report)
                validation.append((number + 1, nats))
                better = self._best.add(nats, number + 1, config.early_stopping.min_delta)
                stopped = self._best.stops(config.early_stopping)  # on all processes alike: so is the loss
            if config.log.sample_every and (number + 1) % config.log.sample_every == 0:
                self._sample(state, frozen, number + 1, report)
            every, keeps = config.checkpoints.every, better and config.early_stopping.patience > 0
            if last or stopping or stopped or keeps or (every and (number + 1) % every == 0):
                saved.save(state, self._meta(), loss=nats)
            if stopping and not last:
                saved.wait()
                raise Preempted(f"SIGTERM: saved at step {number + 1} in {saved.folder}; the same command goes on from there")
            if stopped:
                profile.after(number, last=True)
                break
        saved.wait()
        goodput = productive / max(time.perf_counter() - self.began, 1e-9)
        steps, best = int(state.step), self._best
        if stopped:
            logger.info("stopped at step %d: %d validations in a row did not improve", steps, best.waited)
        if best.step:
            logger.info("best validation: %.4f nats at step %d", best.nats, best.step)
        logger.info("done: %d steps, %d left out; goodput %.0f%%", steps, int(state.skipped), 100 * goodput)
        found = (best.step, best.nats) if best.step else None
        return Result(self.folder, steps, losses, validation, int(state.skipped), goodput, found)

    def _meta(self) -> dict[str, Any]:
        """What a checkpoint tells beside its arrays."""
        return {
            "model": self.model_config.to_hf(),
            "lora": self.trainer.adapters.lora.told() if self.trainer.adapters else {},
            "seed": self.config.seed,
            "rows": self.config.data.batch_size,
            "config": plain(self.config),
            "best": self._best.told(),
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
        found = score(lambda batch: evaluate(state.params, batch, frozen), self.batches["validation"])
        values = {"validation_nats": found.nats_per_token}
        if found.nats_per_character is not None:
            values["validation_nats_per_character"] = found.nats_per_character
        note = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
        report.numbers(number, values, note=note)
        return found.nats_per_token

    def _sample(self, state: State, frozen: Params | None, number: int, report: Report) -> None:
        log = self.config.log
        model = self.trainer.model(state, frozen, dtype=self.stacked.layout.dtype, generating=self._generating)
        llm = LLM(model, tokenizer=self.tokenizer, progress=False)
        prompt: Any = log.sample_prompt if log.sample_prompt and self.tokenizer else [self.model_config.bos_token_id or 0]
        made = llm.generate(prompt, SamplingParams(temperature=0.8, max_tokens=log.sample_tokens, seed=0))[0]
        report.text(number, (made.prompt or "") + (made.outputs[0].text or str(made.outputs[0].token_ids)))


def _note(values: dict[str, float]) -> str:
    shown = [f"loss {values['nats']:.4f}", f"lr {values['learning_rate']:.2e}", f"norm {values['grad_norm']:.2f}"]
    if "router_balance" in values:
        shown.append(f"busiest expert {values['expert_max_over_mean']:.1f}× the mean")
    if "tokens_per_second" in values:
        shown.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in values:
        shown.append(f"MFU {values['mfu']:.1%}")
    return ", ".join(shown)


def train(config: TrainConfig) -> Result:
    """Trains as the config says."""
    return Run(config).train()
