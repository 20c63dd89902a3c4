"""Training: data, loss, step, optimisers, checkpoints, and the loop that joins them."""

from jaxtp.train.config import TrainConfig, load
from jaxtp.train.evaluate import Evaluation, evaluate
from jaxtp.train.export import export
from jaxtp.train.loop import Result, Run, train
from jaxtp.train.stopping import NON_FINITE, PREEMPTED, Diverged, Preempted
from jaxtp.train.tokenizer import train_tokenizer

__all__ = [
    "NON_FINITE",
    "PREEMPTED",
    "Diverged",
    "Evaluation",
    "Preempted",
    "Result",
    "Run",
    "TrainConfig",
    "evaluate",
    "export",
    "load",
    "train",
    "train_tokenizer",
]
