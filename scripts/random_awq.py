"""A checkpoint of random weights in AWQ's format, and what loading it takes of the host's memory.

    python scripts/random_awq.py FOLDER [--gib 1.0]

Prints one line: the file's size, the largest weight's, and the peak of the host's memory while it was read, above what it was
before and what the arrays themselves take (on CPUs they are host memory, too).
"""

from __future__ import annotations

import argparse
import json
import resource
import threading
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1024,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
}
GROUP = 128
LAYER_GIB = 0.112


def write(folder: Path, layers: int) -> None:
    """A folder of so many layers of Llama-3.1-8B's sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, d, f = np.random.default_rng(0), CONFIG["hidden_size"], CONFIG["intermediate_size"]
    sizes = {"q": (4096, d), "k": (1024, d), "v": (1024, d), "o": (d, 4096), "gate": (f, d), "up": (f, d), "down": (d, f)}
    weight_map: dict[str, str] = {}
    for layer in range(layers):
        tensors = {}
        for name, (outputs, inputs) in sizes.items():
            at = f"model.layers.{layer}.{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj"
            word = np.iinfo(np.int32)
            tensors[f"{at}.qweight"] = rng.integers(word.min, word.max, (inputs, outputs // 8), np.int32)
            tensors[f"{at}.qzeros"] = rng.integers(word.min, word.max, (inputs // GROUP, outputs // 8), np.int32)
            tensors[f"{at}.scales"] = (0.01 * rng.random((inputs // GROUP, outputs))).astype(np.float16)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ones(d, np.float16)
        weight_map |= _saved(folder, f"layer-{layer}.safetensors", tensors)
    tables = {name: rng.normal(size=(1024, d)).astype(np.float16) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    weight_map |= _saved(folder, "tables.safetensors", {**tables, "model.norm.weight": np.ones(d, np.float16)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))


def _saved(folder: Path, name: str, tensors: dict[str, np.ndarray]) -> dict[str, str]:
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return dict.fromkeys(tensors, name)


def anonymous() -> int:
    """Bytes of this process's memory that is no file's."""
    said = Path("/proc/self/status").read_text()
    return 1024 * int(said.split("RssAnon:")[1].split()[0])


def main() -> None:
    """Writes, loads, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gib", type=float, default=1.0)
    args = parser.parse_args()
    write(args.folder, max(1, round(args.gib / LAYER_GIB)))
    size = sum(path.stat().st_size for path in args.folder.glob("*.safetensors"))

    import jax

    from jaxtp import Llama

    jax.devices()
    held: dict[str, int] = {"peak": 0}
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            held["peak"] = max(held["peak"], anonymous())
            time.sleep(0.002)

    before = anonymous()
    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    model = Llama.from_pretrained(args.folder, dtype="bfloat16", progress=False)
    took = time.perf_counter() - start
    done.set()
    thread.join()
    arrays = sum(a.nbytes for a in jax.live_arrays())
    largest = 2 * CONFIG["intermediate_size"] * CONFIG["hidden_size"]
    more = held["peak"] - before - arrays
    print(
        f"file {size / 2**30:.2f} GiB, loaded in {took:.1f} s, arrays {arrays / 2**30:.2f} GiB; the largest weight has "
        f"{largest / 2**20:.0f} Mi values; peak beside the arrays {more / 2**20:.0f} MiB: {more / largest:.2f} bytes a value "
        f"({resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB in all); {model.config.num_layers} layers"
    )


if __name__ == "__main__":
    main()
