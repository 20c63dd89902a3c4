"""Models and trainers from shapes alone, for the tests that read what their programs do.

Generation's programs grow with their layers, all of which do the same: a few are compiled. WHOLE_MODELS=1 compiles all, for
the figures of BENCHMARKS.md and docs/planner.md.
"""

import dataclasses
import os

from jaxtp import Llama, Rules
from jaxtp.audit import compile_step as compiled
from jaxtp.model.stacked import Stacked
from jaxtp.parallel.pipeline import Pipeline
from jaxtp.parallel.stages import Stages
from jaxtp.train.lora import Adapters
from jaxtp.train.optim import Optimizer, transformation
from jaxtp.train.step import Trainer

__all__ = ["compiled", "shallow", "trainer"]


def shallow(config, layers):
    """The model with so many layers."""
    return config if os.environ.get("WHOLE_MODELS") else dataclasses.replace(config, num_layers=layers, windows=())


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
