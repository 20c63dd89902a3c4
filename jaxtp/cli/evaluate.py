"""The verb eval: how well a model predicts some data."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxtp.cli.options import Alias, Flag, Launch, Model, ModelFlag, writable


@dataclass(frozen=True)
class Eval:
    """Measure how well a run or a model predicts data: nats a token and perplexity; of text, bits a byte."""

    model: Model = None
    """Folder of a run, checkpoint folder, hub id, or "demo"."""
    data: Annotated[tyro.conf.Positional[tuple[str, ...]], Alias(metavar="FILE [FILE ...]")] = ()
    """Files, as `jaxtp train` reads them."""
    named_model: ModelFlag = None
    """The same as MODEL; all that has no flag is then data."""
    step: int | None = None
    """Of a run: the checkpoint of this step; default the last one."""
    best: Flag = False
    """Of a run: the checkpoint with the lowest validation loss."""
    lora: str | None = None
    """Adapter in PEFT's format (folder or hub id), merged into the weights of a model."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, where it is not the model's."""
    kind: str = "auto"
    """What the files hold; see `data.kind` of `jaxtp train`."""
    text_key: str = "text"
    """The key of a record's text."""
    train_on: Literal["assistant", "all", "last"] | None = None
    """What counts of conversations and of prompts with completions; default what the run learned, else its answers."""
    sequence_length: int | None = None
    """Tokens of a window; default the run's, or what the model takes, at most 2048."""
    stride: int | None = None
    """Tokens from a window to the next; default its length. Less gives every token more to see. Each counts once."""
    batch_size: int | None = None
    """Rows at once, over all devices; default 8 for each group and stage."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the computation; auto: the run's, or the checkpoint's."""
    tensor_parallel_size: Annotated[int, Alias(aliases=["-tp"])] = 1
    """Devices that share each layer."""
    pipeline_parallel_size: Annotated[int, Alias(aliases=["-pp"])] = 1
    """Stages that the layers are split into, one behind another."""
    data_parallel_size: Annotated[int, Alias(aliases=["-dp"])] = 1
    """Groups of devices that share the rows."""
    context_parallel_size: Annotated[int, Alias(aliases=["-cp"])] = 1
    """Devices over which the tokens of each row are spread."""
    sequence_parallel: Flag = False
    """Shard the residual stream over tokens."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    json: Path | None = None
    """Write the figures there."""
    virtual_devices: int | None = None
    """Run on this many virtual CPU devices."""
    no_compilation_cache: Flag = False
    """Compile anew: keep no programs in the user's cache folder."""
    launch: tyro.conf.OmitArgPrefixes[Launch] = field(default_factory=Launch)

    def run(self) -> None:
        """Measures and prints."""
        from jaxtp import compilation_cache, train, use_virtual_devices

        given = [self.model, *self.data] if self.model else [*self.data]
        model = self.named_model or (given.pop(0) if given else None)
        if model is None or not given:
            raise ValueError("give a model and the files to measure it on: jaxtp eval MODEL FILE ...")
        writable("--json", self.json)
        if self.no_compilation_cache:
            compilation_cache.switch_off()
        if self.virtual_devices is not None:
            use_virtual_devices(self.virtual_devices)
        own = ("model", "named_model", "data", "json", "virtual_devices", "no_compilation_cache", "launch")
        arguments = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in own}
        with self.launch.join() as nodes:
            speaks = nodes is None or nodes.index == 0
            with contextlib.nullcontext() if speaks else contextlib.redirect_stdout(io.StringIO()):
                found = train.evaluate(model, given, **arguments)
                found.print()
                if self.json and speaks:
                    found.save(self.json)
