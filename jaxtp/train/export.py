"""What leaves a run: a model, or an adapter, as Hugging Face folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp

from jaxtp.checkpoint import adapters, hf
from jaxtp.config import ModelConfig
from jaxtp.files import local
from jaxtp.log import logger
from jaxtp.mesh import make_mesh
from jaxtp.model import Llama
from jaxtp.model.stacked import Stacked
from jaxtp.train.build import trainer_of, weights_of
from jaxtp.train.checkpoints import Checkpoints, chosen
from jaxtp.train.config import parse


def export(
    run_folder: str | Path,
    folder: str | Path,
    *,
    dtype: str | None = None,
    step: int | None = None,
    best: bool = False,
    adapter: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint of a run (default the last) as a Hugging Face folder, with its tokenizer.

    dtype: of the weights written, default the one that the run computed in. best: the checkpoint with the lowest validation
    loss. adapter: of a LoRA run the adapter alone, in PEFT's format (dtype: default float32, as it was trained). overwrite:
    replace what is in a folder that is not empty. Raises FileExistsError for such a folder without, and ValueError where there
    is no checkpoint that can be read.
    """
    run_folder, folder = local(run_folder), local(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise FileExistsError(f"{folder} is there and not empty; give a new folder, or --overwrite (overwrite=True)")
    number, meta = chosen(run_folder / "checkpoints", step=step, best=best)
    config = replace(
        parse(meta["config"], where=f"the config kept in {run_folder}"), folder=str(run_folder)
    )  # it may have moved
    stacked = Stacked(Llama(ModelConfig.from_hf(meta["model"]), mesh=make_mesh()))
    trainer = trainer_of(config, stacked)
    if adapter and not trainer.adapters:
        raise ValueError(f"{run_folder} trained all weights: it has no adapter to export; leave out --adapter (adapter=True)")
    saved = Checkpoints(run_folder / "checkpoints", trainer)
    found = saved.restore(step if not best else number)
    saved.close()
    if found is None:
        raise ValueError(f"{run_folder} has no checkpoint that can be read")
    state, start, tokenizer = found[0], config.model.start, config.tokenizer or config.model.start
    source = hf.resolve(tokenizer) if tokenizer else None
    if adapter and trainer.adapters and start:
        dtype = dtype or "float32"
        matrices = trainer.adapters.matrices({path: a.astype(dtype) for path, a in state.params.items()})
        hub = "/" in start and not Path(start).expanduser().is_dir()
        base = start if hub else str(hf.resolve(start).absolute())
        adapters.write(folder, trainer.adapters.lora, matrices, base=base, tokenizer=source)
    else:
        frozen = weights_of(trainer, hf.resolve(start or ""), dtype="float32") if trainer.adapters else None
        dtype = dtype or config.model.dtype
        model = trainer.model(state, frozen, dtype=jnp.dtype(dtype))
        model.source = str(source) if source else None
        model.save_pretrained(folder)
    what = "the adapter of " if adapter else ""
    logger.info("wrote %sstep %d of %s to %s, in %s", what, int(state.step), run_folder, folder, dtype)
