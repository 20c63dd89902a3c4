"""A training step compiled from shapes alone, for the tests that read what it does."""

import jax
import jax.numpy as jnp

from jaxtp import Llama, Rules
from jaxtp.audit.targets import not_cached
from jaxtp.model.stacked import Stacked
from jaxtp.parallel.pipeline import Pipeline
from jaxtp.parallel.stages import Stages
from jaxtp.train.lora import Adapters
from jaxtp.train.loss import Batch
from jaxtp.train.optim import Optimizer, transformation
from jaxtp.train.step import Trainer


def trainer(config, mesh, *, dtype="bfloat16", sequence_parallel=False, lora=None, schedule="1f1b", chunks=1, **settings):
    """AdamW on an abstract model; a pipeline where the mesh has pp."""
    rules, pipeline = Rules().sequence_parallel() if sequence_parallel else Rules(), None
    if mesh.shape["pp"] > 1:
        rules = rules.pipeline_parallel()
        pipeline = Pipeline(mesh, Stages.split(config.num_layers, ranks=mesh.shape["pp"], chunks=chunks), schedule)
    stacked = Stacked(Llama(config, mesh=mesh, rules=rules, dtype=dtype))
    adapters = Adapters(stacked, lora) if lora else None
    optimizer = transformation(Optimizer(), 100, (adapters or stacked).specs())
    return Trainer(stacked, optimizer, adapters, pipeline, **settings)


def compiled(trainer, *, rows, tokens, accumulate=1):
    """Its step, for microbatches of `rows` rows."""
    layout = trainer.stacked.layout
    place = layout.sharding(None, "batch", "tokens")
    ints, floats = (jax.ShapeDtypeStruct((accumulate, rows, tokens), d, sharding=place) for d in (jnp.int32, jnp.float32))
    with jax.set_mesh(layout.mesh), not_cached():
        step = jax.jit(trainer.step, donate_argnums=0)
        return step.lower(trainer.abstract_state(), Batch(ints, ints, floats, ints), trainer.abstract_frozen()).compile()
