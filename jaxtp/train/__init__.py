"""Training: data, loss, step, optimisers, checkpoints, and the loop that joins them."""

from jaxtp.train.config import TrainConfig, load
from jaxtp.train.loop import NON_FINITE, PREEMPTED, Diverged, Preempted, Result, Run, export, train
from jaxtp.train.tokenizer import train_tokenizer

__all__ = [
    "NON_FINITE",
    "PREEMPTED",
    "Diverged",
    "Preempted",
    "Result",
    "Run",
    "TrainConfig",
    "export",
    "load",
    "train",
    "train_tokenizer",
]
