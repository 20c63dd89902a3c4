"""A trainer from shapes alone, for the tests that read what its step does."""

from jaxtp import Llama, Rules
from jaxtp.audit import compile_step as compiled
from jaxtp.model.stacked import Stacked
from jaxtp.parallel.pipeline import Pipeline
from jaxtp.parallel.stages import Stages
from jaxtp.train.lora import Adapters
from jaxtp.train.optim import Optimizer, transformation
from jaxtp.train.step import Trainer

__all__ = ["compiled", "trainer"]


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
