"""Training in a process that can be killed: forked from one that has imported everything and touched no device."""

import multiprocessing

from jaxtp.train import load, train

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["kills"])


def start(path):
    """A run of the YAML file at `path`."""
    process = forks.Process(target=_train, args=(path,), daemon=True)
    process.start()
    return process


def _train(path):
    train(load(path))
