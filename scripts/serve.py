"""Serves a model on every GPU of this machine, by the Python API.

    python scripts/serve.py org/name
    python scripts/serve.py org/name --host 0.0.0.0 --api-key KEY

The model is split over as many GPUs as its heads and widths allow (or --tp); what is left over holds further copies, each with
a share of the requests (or --dp). `jaxtp serve` has every other flag.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import jax
import tyro

from jaxtp import LLM, use_virtual_devices
from jaxtp.checkpoint import hf
from jaxtp.serve import Settings, serve


@dataclass(frozen=True)
class Args:
    """What to serve, and on what."""

    model: tyro.conf.Positional[str]
    """Checkpoint folder or hub id."""
    tp: int | None = None
    dp: int | None = None
    max_model_len: int | None = None
    dtype: str = "auto"
    virtual_devices: int | None = None
    """CPU devices, on a machine without GPUs."""
    server: tyro.conf.OmitArgPrefixes[tyro.conf.FlagCreatePairsOff[Settings]] = field(default_factory=Settings)


def load(args: Args) -> LLM:
    """The model on all devices."""
    if args.virtual_devices:
        use_virtual_devices(args.virtual_devices)
    devices = len(jax.devices())
    tp = args.tp or max(size for size in hf.config_of(hf.resolve(args.model)).legal_tp(devices) if devices % size == 0)
    sizes = {"tensor_parallel_size": tp, "data_parallel_size": args.dp or devices // tp}
    return LLM(args.model, **sizes, dtype=args.dtype, max_model_len=args.max_model_len, max_num_queued=4096)


def main(args: Args) -> None:
    """Serves."""
    names = args.server.served_model_name or (args.model,)
    serve(lambda: load(args), dataclasses.replace(args.server, served_model_name=names))


if __name__ == "__main__":
    main(tyro.cli(Args))
