"""Training speed beside transformers and torch: the same shape, dtype and machine, in one run, as ratios.

    python scripts/benchmark_train.py                                  # h 512, MLP 1408, 8 layers, batch 8 × 256, on the CPU
    python scripts/benchmark_train.py --hidden 2048 --mlp 8192 --layers 16 --heads 32 --kv-heads 8 --vocab 128256 \\
        --batch 8 --length 4096 --dtypes bfloat16 --remat full         # a 1B model on a GPU

Forward, backward, clipping and AdamW on float32 parameters; bfloat16 is mixed precision on both sides (torch: autocast; on a
GPU with torch.compile and gradient checkpointing where --remat is full). Compilation is reported apart.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Args:
    """What to measure."""

    hidden: int = 512
    mlp: int = 1408
    layers: int = 8
    heads: int = 8
    kv_heads: int = 8
    vocab: int = 8192
    batch: int = 8
    length: int = 256
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    remat: Literal["none", "full", "save-dots", "save-attention"] = "none"
    steps: int = 3
    rounds: int = 3
    """Turns of `steps` steps of either side, after one that does not count; the best turn counts."""
    theirs: bool = True
    """Measure transformers too."""


def main(args: Args) -> None:
    """Measures and prints."""
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.6")
    import jax

    from jaxtp.train.meter import peak_flops, train_flops

    table = Table(title="training beside transformers (ratio above 1: jaxtp is faster)")
    for column in ("dtype", "jaxtp tok/s", "transformers tok/s", "ratio", "TFLOP/s", "MFU", "compile s"):
        table.add_column(column, justify="right")
    tokens = args.batch * args.length * args.steps
    for dtype in args.dtypes:
        ours = Ours(args, dtype)
        theirs = Theirs(args, dtype) if args.theirs else None
        mine = other = float("inf")
        for _ in range(args.rounds):
            mine = min(mine, warm(ours, args.steps))
            other = min(other, warm(theirs, args.steps)) if theirs else float("nan")
        rate = tokens / mine * train_flops(ours.config, args.length)[0]
        peak = peak_flops(jax.devices()[0])
        share = f"{rate / peak:.1%}" if peak else "-"
        cells = (f"{tokens / mine:,.0f}", f"{tokens / other:,.0f}", f"{other / mine:.2f}", f"{rate / 1e12:.2f}", share)
        table.add_row(dtype, *cells, f"{ours.compiling:.1f}")
    Console(width=120).print(table)


def warm(side: Ours | Theirs, steps: int) -> float:
    """Seconds of that many steps, after one that gets its memory back from the other side."""
    side.run(1)
    return side.run(steps)


class Ours:
    """jaxtp on the first device, or on so many of an axis."""

    def __init__(self, args: Args, dtype: str, **axes: int) -> None:
        import jax

        from jaxtp import Llama, ModelConfig, Rules, make_mesh
        from jaxtp.model.stacked import Stacked
        from jaxtp.parallel.context import Context
        from jaxtp.train.loss import Batch
        from jaxtp.train.optim import Optimizer, transformation
        from jaxtp.train.step import Trainer

        self.config = ModelConfig(
            model_type="llama", vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.mlp,
            num_layers=args.layers, num_heads=args.heads, num_kv_heads=args.kv_heads, head_dim=args.hidden // args.heads,
            max_position_embeddings=args.length,
        )  # fmt: skip
        mesh, cp = make_mesh(**{"dp": 1, **axes}), axes.get("cp", 1)
        rules, context = (Rules().context_parallel(), Context(cp)) if cp > 1 else (Rules(), None)
        stacked = Stacked(Llama(self.config, mesh=mesh, dtype=dtype, rules=rules, context=context))
        optimizer = transformation(Optimizer(schedule="constant", warmup_steps=0), 100, stacked.specs())
        trainer = Trainer(stacked, optimizer, remat=args.remat)
        rows = np.random.default_rng(0).integers(0, args.vocab, (1, args.batch, args.length + 1)).astype(np.int32)
        place = stacked.layout.sharding(None, "batch", "tokens")
        positions = np.broadcast_to(np.arange(args.length, dtype=np.int32), rows[..., 1:].shape)
        order = context.order(args.length) if context else slice(None)
        arrays = (
            rows[..., :-1][..., order],
            rows[..., 1:][..., order],
            np.ones(positions.shape, np.float32),
            positions[..., order],
        )
        self.batch = Batch(*(jax.device_put(a, place) for a in arrays))
        with jax.set_mesh(mesh):
            self.state = trainer.begin(stacked.stack(Llama.random(self.config, mesh=mesh, rules=rules, context=context)))
            start = time.perf_counter()
            self.step = trainer.jitted().lower(self.state, self.batch).compile()
            self.compiling = time.perf_counter() - start
        self.run(1)

    def run(self, steps: int) -> float:
        """Seconds of that many steps."""
        import jax

        start = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start


class Theirs:
    """transformers, on the GPU where there is one."""

    def __init__(self, args: Args, dtype: str) -> None:
        import torch
        import transformers

        config = transformers.LlamaConfig(
            hidden_size=args.hidden, intermediate_size=args.mlp, num_hidden_layers=args.layers,
            num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, vocab_size=args.vocab,
            max_position_embeddings=args.length, use_cache=False,
        )  # fmt: skip
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device(self.device):
            self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
        if args.remat == "full":
            self.model.gradient_checkpointing_enable()
        self.forward = torch.compile(self.model) if self.device == "cuda" else self.model
        self.cast = torch.autocast(self.device, torch.bfloat16, enabled=dtype == "bfloat16")
        fused = {"fused": True} if self.device == "cuda" else {}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, **fused)
        self.ids = torch.randint(0, args.vocab, (args.batch, args.length), device=self.device)
        self.run(1)

    def run(self, steps: int) -> float:
        """Seconds of that many steps."""
        import torch

        start = time.perf_counter()
        for _ in range(steps):
            with self.cast:
                loss = self.forward(input_ids=self.ids, labels=self.ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


if __name__ == "__main__":
    main(tyro.cli(Args))
