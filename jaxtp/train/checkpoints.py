"""Checkpoints of a run, by orbax: asynchronous, atomic, the last k and the best; restored onto any mesh and ZeRO stage.

They hold the parameters as a single device would (KV heads once, the vocabulary unpadded), stacked over layers in the model's
order, so nothing in them depends on how the run was spread.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep_policy

from jaxtp.log import logger
from jaxtp.model.stacked import Spec
from jaxtp.sharding import size
from jaxtp.train.state import State, by_param
from jaxtp.train.step import Trainer


class Checkpoints:
    """The checkpoints in a folder."""

    def __init__(self, folder: str | Path, trainer: Trainer, *, keep: int = 2, best: int = 1) -> None:
        """keep: the last so many. best: and those with the lowest validation loss."""
        policies = [keep_policy.LatestN(max(keep, 1))]
        if best:
            policies.append(keep_policy.BestN(get_metric_fn=_loss, reverse=True, n=best))  # type: ignore[arg-type]
        # with best_fn losses are written beside the arrays, where a run that goes on finds them
        options = ocp.CheckpointManagerOptions(
            best_fn=_loss, best_mode="min", preservation_policy=keep_policy.AnyPreservationPolicy(policies)
        )
        self.folder, self._trainer = Path(folder).absolute(), trainer
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """The steps of which there is a complete checkpoint."""
        return sorted(self._manager.all_steps())

    def save(self, state: State, meta: dict[str, Any], *, loss: float | None) -> None:
        """Starts to write; returns when the arrays are copied, so that the state may be donated. `meta` is JSON.

        Raises OSError where the last one could not be written, as on a full disk; nothing that was complete is lost.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_plain(self._convert(state, held=False))), meta=ocp.args.JsonSave(meta)
        )
        self._manager.save(step, args=args, metrics={"loss": float("inf") if loss is None else loss}, force=True)

    def restore(self, step: int | None = None) -> tuple[State, dict[str, Any]] | None:
        """The newest checkpoint that can be read (or that of `step`), and its meta; None where there is none.

        One that cannot is reported and the one before it taken. Raises ValueError where a checkpoint is of another model.
        """
        for number in reversed(self.steps()) if step is None else [step]:
            try:
                meta = self._manager.restore(number, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
                self._check(meta, number)
                wanted = ocp.args.StandardRestore(_plain(self._abstract()))
                found = self._manager.restore(number, args=ocp.args.Composite(state=wanted))["state"]
            except _Mismatch as error:
                raise ValueError(str(error)) from None
            except Exception as error:  # whatever a damaged file leads to
                logger.warning("the checkpoint of step %d cannot be read (%s); trying the one before", number, _line(error))
                continue
            return self._convert(State(**found), held=True), meta
        return None

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        self._manager.close()

    # -- as a single device would hold it ------------------------------------------------------------------------------

    def _check(self, meta: dict[str, Any], step: int) -> None:
        adapters = self._trainer.adapters
        mine = {**self._trainer.stacked.config.to_hf(), **(adapters.lora.told() if adapters else {})}
        other = {**meta.get("model", {}), **meta.get("lora", {})}
        differ = [k for k in sorted({*mine, *other}) if mine.get(k) != other.get(k) and k != "torch_dtype"]
        if differ:
            shown = ", ".join(f"{k} {other.get(k)} (here {mine.get(k)})" for k in differ)
            raise _Mismatch(f"the checkpoint of step {step} in {self.folder} is of another model: {shown}")

    @functools.cached_property
    def _differs(self) -> bool:
        """Whether the state as held is another than the state as saved."""
        pipeline = self._trainer.pipeline
        other_order = pipeline is not None and not pipeline.in_order
        return other_order or any(self._shape(path, spec) != spec.shape for path, spec in self._trainer.specs.items())

    def _shape(self, path: str, spec: Spec) -> tuple[int, ...]:
        """As saved."""
        stacked, shape = self._trainer.stacked, spec.shape
        if spec.dims[0] == "layers":
            shape = (len(stacked.layers(path)), *shape[1:])
        if path in ("embed", "head"):
            return (stacked.config.vocab_size, *shape[1:])
        if "kv_heads" in spec.dims and "fused" in spec.dims:
            copies = stacked.kv_copies
            return (shape[0], shape[1] // copies, (shape[2] - spec.kv) * copies + spec.kv, *shape[3:])
        return shape

    def _abstract(self) -> State:
        """What is saved: shapes and layouts."""

        def one(path: str | None, leaf: Any) -> Any:
            held = self._trainer.specs.get(path or "")
            if held is None or not (_stacked(leaf, held) or leaf.shape == held.shape):
                return leaf
            saved, mesh = self._shape(path or "", held), leaf.sharding.mesh
            shape = saved if leaf.shape == held.shape else (saved[0], *leaf.shape[1:])
            partitions = leaf.sharding.spec.partitions + (None,) * (len(shape) - len(leaf.sharding.spec.partitions))
            axes = [a if n % size(mesh, a) == 0 else None for a, n in zip(partitions, shape, strict=True)]
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

        state = self._trainer.abstract_state()
        return by_param(one, state, state.params)

    def _convert(self, state: State, *, held: bool) -> State:
        """The state as the mesh holds it, or as it is saved."""
        if not self._differs:
            return state
        target = self._trainer.abstract_state() if held else self._abstract()
        specs, pipeline = self._trainer.specs, self._trainer.pipeline
        kinds = by_param(lambda path, leaf: specs.get(path or "", NO_PARAMETER), self._trainer.abstract_state(), state.params)
        ordered = pipeline is None or pipeline.in_order

        def one(leaf: jax.Array, wanted: jax.ShapeDtypeStruct, spec: Spec) -> jax.Array:
            moved = not ordered and _stacked(wanted if held else leaf, spec)

            def change(a: jax.Array) -> jax.Array:
                a = pipeline.restore(a, spec.layers) if pipeline and moved and not held else a
                shape = (a.shape[0], *wanted.shape[1:]) if moved else wanted.shape
                a = a if a.shape == shape else (_widen if held else _narrow)(a, shape=shape, kv=spec.kv)
                return pipeline.arrange(a, spec.layers) if pipeline and moved and held else a

            if leaf.shape == wanted.shape and not moved:
                return leaf
            return jax.sharding.auto_axes(change, out_sharding=wanted.sharding)(leaf)

        with jax.set_mesh(self._trainer.stacked.layout.mesh):
            layouts = jax.tree.map(lambda a: a.sharding, target)
            return jax.jit(lambda state: jax.tree.map(one, state, target, kinds), out_shardings=layouts)(state)


def _loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]


NO_PARAMETER = Spec((), (), PartitionSpec())


def _stacked(leaf: Any, spec: Spec) -> bool:
    """Whether an array that belongs to a parameter is held layer by layer, in the order of the parameter."""
    return spec.dims[:1] == ("layers",) and leaf.shape[:1] == spec.shape[:1]


def chosen(folder: str | Path, *, step: int | None = None, best: bool = False) -> tuple[int, dict[str, Any]]:
    """(step, what it tells beside its arrays) of the last checkpoint in a folder, that of `step`, or the one with the lowest
    validation loss. Raises ValueError where there is none.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of checkpoints")
    if best and step is not None:
        raise ValueError(f"step={step} and best exclude one another")
    with ocp.CheckpointManager(folder) as manager:
        steps = sorted(manager.all_steps())
        if not steps or step not in (None, *steps):
            raise ValueError(f"{folder} has no checkpoint{f' of step {step}; steps: {steps}' if steps else ''}")
        number = step or steps[-1]
        if best:
            losses = {each: (manager.metrics(each) or {}).get("loss", math.inf) for each in steps}
            number = min(steps, key=lambda each: losses[each])
            if not losses[number] < math.inf:
                raise ValueError(f"no checkpoint in {folder} was saved at a validation; steps: {steps}")
        return number, manager.restore(number, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


class _Mismatch(ValueError):
    pass


def _narrow(a: jax.Array, shape: tuple[int, ...], kv: int) -> jax.Array:
    """Padding cut off; of the copies of a KV head (the last `kv` rows of dim 2) the first."""
    if len(shape) == 2:
        return a[: shape[0]]
    queries, copies = a.shape[2] - kv, a.shape[1] // shape[1]
    q = a[:, :, :queries].reshape(*shape[:2], shape[2] - kv, *shape[3:])
    return jnp.concatenate([q, a[:, ::copies, queries:]], axis=2)


def _widen(a: jax.Array, shape: tuple[int, ...], kv: int) -> jax.Array:
    """The reverse."""
    if len(shape) == 2:
        return jnp.pad(a, ((0, shape[0] - a.shape[0]), (0, 0)))
    queries, copies = a.shape[2] - kv, shape[1] // a.shape[1]
    q = a[:, :, :queries].reshape(*shape[:2], shape[2] - kv, *shape[3:])
    return jnp.concatenate([q, jnp.repeat(a[:, :, queries:], copies, axis=1)], axis=2)


def _plain(state: State) -> dict[str, Any]:
    return {"params": state.params, "opt": state.opt, "step": state.step, "skipped": state.skipped}


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
