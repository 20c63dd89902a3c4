"""A tiny trainer and its batches, for the tests of training."""

import functools
from dataclasses import dataclass

import jax
import numpy as np
import tiny
from jax.sharding import NamedSharding

from jaxtp import Llama, ModelConfig, Rules, make_mesh
from jaxtp.model.stacked import Stacked
from jaxtp.parallel.context import Context
from jaxtp.parallel.experts import exchange
from jaxtp.parallel.pipeline import Pipeline
from jaxtp.parallel.stages import Stages
from jaxtp.sharding import put
from jaxtp.train.lora import Adapters, Lora
from jaxtp.train.loss import Batch
from jaxtp.train.optim import Optimizer, transformation
from jaxtp.train.state import State
from jaxtp.train.step import Trainer
from jaxtp.weights import variables

SETTINGS = Optimizer(learning_rate=1e-2, warmup_steps=3)


@dataclass
class Run:
    """A trainer with its state, and its step compiled."""

    trainer: Trainer
    state: State
    frozen: dict[str, jax.Array] | None = None

    def step(self, arrays: dict[str, np.ndarray], *, accumulate: int = 1):
        return self.learn(arrays, accumulate=accumulate)[0]

    def learn(self, arrays: dict[str, np.ndarray], *, accumulate: int = 1):
        """A step's metrics, and its gradient: of the mean loss of a batch, at the parameters before. One program for both."""
        with jax.set_mesh(self.trainer.stacked.layout.mesh):
            if not hasattr(self, "_step"):
                self._step = jax.jit(self.trainer.step_and_gradients, donate_argnums=0)
            self.state, metrics, grads = self._step(self.state, self.batch(arrays, accumulate=accumulate), self.frozen)
        return metrics, grads

    def batch(self, arrays: dict[str, np.ndarray], *, accumulate: int = 1) -> Batch:
        """[B, T] arrays as [A, B/A, T] on the mesh."""
        stacked = self.trainer.stacked
        place, context = stacked.layout.sharding(None, "batch", "tokens"), stacked.model.context
        if context:
            T = next(iter(arrays.values())).shape[-1]
            more, order = (0, context.padded(T) - T), context.order(context.padded(T))
            arrays = {k: np.pad(a, ((0, 0), more))[:, order] for k, a in arrays.items()}
        return Batch(**{k: jax.device_put(a.reshape(accumulate, -1, a.shape[-1]), place) for k, a in arrays.items()})


@functools.cache
def drawn(config: ModelConfig) -> dict[str, np.ndarray]:
    """The random weights of one device, on the host."""
    return {path: np.asarray(weight[...]) for path, weight in variables(Llama.random(config, seed=1))}


def random(stacked: Stacked) -> dict[str, jax.Array]:
    """The same on every mesh, without programs that draw them there; where a mesh pads or repeats them, by those."""
    weights, layout, found = drawn(stacked.config), stacked.layout, {}
    for path, spec in stacked.specs().items():
        own = [weights[path.replace("*", str(layer))] for layer in spec.layers]
        value = np.stack(own) if own else weights[path]
        if value.shape != spec.shape:
            more = {"mesh": layout.mesh, "rules": layout.rules, "dispatch": exchange, "context": stacked.model.context}
            return stacked.stack(Llama.random(stacked.config, **more, seed=1))
        found[path] = put(value, NamedSharding(layout.mesh, spec.spec))
    return found


def run(
    config: ModelConfig | None = None,
    *,
    mesh: dict[str, int] | None = None,
    sequence_parallel: bool = False,
    settings: Optimizer = SETTINGS,
    model: Llama | None = None,
    dtype: str = "float32",
    steps: int = 20,
    lora: Lora | None = None,
    schedule: str = "1f1b",
    chunks: int = 1,
    layers_per_stage: tuple[int, ...] | None = None,
    expert_layout: str = "auto",
    expert_dispatch: str = "gather",
    strategy: str | None = None,
    **trainer,
) -> Run:
    """A run of the tiny model from random weights that are the same on every mesh, or from a loaded model's."""
    config = config or tiny.config()
    over = make_mesh(**(mesh or {}))
    rules = Rules().sequence_parallel() if sequence_parallel else Rules()
    rules = rules.expert_parallel(
        config, ep=over.shape["ep"], tp=over.shape["tp"], layout=expert_layout, dispatch=expert_dispatch
    )
    pipeline, pp, cp = None, over.shape["pp"], over.shape["cp"]
    rules = rules.context_parallel() if cp > 1 else rules
    if pp > 1:
        rules = rules.pipeline_parallel()
        pipeline = Pipeline(over, Stages.split(config.num_layers, ranks=pp, chunks=chunks, sizes=layers_per_stage), schedule)
    context = Context(cp, strategy) if cp > 1 else None
    stacked = Stacked(Llama(config, mesh=over, rules=rules, dtype=dtype, dispatch=exchange, context=context))
    adapters = Adapters(stacked, lora) if lora else None
    optimizer = transformation(settings, steps, (adapters or stacked).specs())
    made = Trainer(stacked, optimizer, adapters, pipeline, clip_norm=settings.clip_norm, **trainer)
    params = stacked.stack(model) if model else random(stacked)
    if not adapters:
        return Run(made, made.begin(params))
    return Run(made, made.begin(adapters.begin(seed=2)), made.freeze(params))


def rows(seed: int, *, batch: int = 8, length: int = 32, vocab: int = 128) -> dict[str, np.ndarray]:
    """A batch of random tokens, all of which count but the padding at the end of some rows."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, (batch, length + 1)).astype(np.int32)
    ends = rng.integers(length // 2, length + 1, batch)
    return {
        "tokens": ids[:, :-1],
        "labels": ids[:, 1:],
        "weights": (np.arange(length) < ends[:, None]).astype(np.float32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (batch, 1)),
    }


def packed(seed: int, *, batch: int = 8, length: int = 32, vocab: int = 128) -> dict[str, np.ndarray]:
    """The same with two documents in each row: positions and attention start again in the second."""
    found = rows(seed, batch=batch, length=length, vocab=vocab)
    cuts = np.random.default_rng(seed + 1).integers(4, length - 4, batch)
    place = np.arange(length)
    second = place >= cuts[:, None]
    found["segment_ids"] = (second + 1).astype(np.int32)
    found["positions"] = np.where(second, place - cuts[:, None], place).astype(np.int32)
    found["weights"] = found["weights"] * (place != cuts[:, None] - 1)
    return found
