"""Optimisers by name: optax's, with a schedule, decay where it belongs, and which dims Muon orthogonalises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import optax
from optax.contrib import MuonDimensionNumbers, muon

from jaxtp.model.stacked import Spec


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """How weights change.

    learning_rate: the peak. schedule: after `warmup_steps` of linear warm-up, `cosine` or `linear` to
    `final_learning_rate` (a share of the peak) at the last step; `wsd` stays at the peak and falls linearly over the last
    `decay_share` of the steps; `constant` stays. b1, b2, eps: of Adam, also for what Muon leaves to it. weight_decay holds
    for kernels, not for norms and biases. clip_norm: the largest global norm of a gradient, 0 for none.
    muon_learning_rate: of the blocks' kernels (scaled to Adam's RMS, arXiv:2502.16982); default learning_rate.
    """

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    learning_rate: float = 3e-4
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: int = 100
    final_learning_rate: float = 0.1
    decay_share: float = 0.2
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    muon_learning_rate: float | None = None

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must be above 0")
        for name in ("final_learning_rate", "decay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must be in [0, 1]")
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must be at least 0")


def schedule(o: Optimizer, steps: int, *, peak: float | None = None) -> optax.Schedule:
    """The learning rate at each step, of `steps` in all."""
    peak, warm = o.learning_rate if peak is None else peak, min(o.warmup_steps, steps)
    left, floor = max(steps - warm, 1), peak * o.final_learning_rate
    if o.schedule == "cosine":
        after: optax.Schedule = optax.cosine_decay_schedule(peak, left, alpha=o.final_learning_rate)
    elif o.schedule == "linear":
        after = optax.linear_schedule(peak, floor, left)
    elif o.schedule == "wsd":
        decay = max(round(steps * o.decay_share), 1)
        after = optax.linear_schedule(peak, floor, decay, transition_begin=max(left - decay, 0))
    else:
        after = optax.constant_schedule(peak)
    if not warm:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / warm, peak, max(warm - 1, 1)), after], [warm])


def transformation(o: Optimizer, steps: int, specs: dict[str, Spec]) -> optax.GradientTransformation:
    """The optimiser of these parameters (clipping is the step's, which knows the norm)."""
    decayed = {path: kernel(spec) for path, spec in specs.items()}
    rate = schedule(o, steps)
    if o.name == "adamw":
        return optax.adamw(rate, o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=decayed)
    if o.name == "adafactor":
        # decay in units of the learning rate, as AdamW's
        return optax.chain(
            optax.adafactor(rate, multiply_by_parameter_scale=False, clipping_threshold=1.0),
            _decay(o.weight_decay, rate, decayed),
        )
    matrices = {path: _matrix(spec) if path.startswith("layers.") and kernel(spec) else None for path, spec in specs.items()}
    muon_rate = schedule(o, steps, peak=o.muon_learning_rate)
    return optax.chain(
        muon(
            muon_rate,
            adam_b1=o.b1,
            adam_b2=o.b2,
            eps=o.eps,
            adam_learning_rate=rate,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=0.2,
        ),
        _decay(o.weight_decay, muon_rate, {path: matrix is not None for path, matrix in matrices.items()}),
        _decay(o.weight_decay, rate, {path: decayed[path] and matrix is None for path, matrix in matrices.items()}),
    )


def kernel(spec: Spec) -> bool:
    """Whether a parameter is a matrix or a table, not a norm or a bias."""
    dims = [dim for dim in spec.dims if dim != "layers"]
    return len(dims) > 1 and not {"embed", "rank"}.isdisjoint(dims)


def _matrix(spec: Spec) -> MuonDimensionNumbers:
    """Inputs and outputs of a kernel. Each layer, each expert, each head of q, k and v, and gate and up are matrices of their
    own: so where tp holds a KV head several times, its copies stay equal.
    """
    into = len(spec.dims) - 1  # kernels are output-first
    apart = ("layers", "gate_up", "kv_heads", "fused", "experts")
    outputs = tuple(i for i, dim in enumerate(spec.dims) if dim not in apart and i != into)
    return MuonDimensionNumbers(reduction_axis=(into,), output_axis=outputs)


def _decay(weight_decay: float, rate: optax.Schedule, mask: dict[str, bool]) -> optax.GradientTransformation:
    """-rate · weight_decay · parameter, added to updates that are final."""
    by_rate = optax.chain(optax.add_decayed_weights(weight_decay, mask), optax.scale_by_learning_rate(rate))

    def update(updates, state, params):  # type: ignore[no-untyped-def]
        zeros = optax.tree.zeros_like(updates)
        decay, state = by_rate.update(zeros, state, params)
        return optax.tree.add(updates, decay), state

    return optax.GradientTransformation(by_rate.init, update)
