"""Verbs that say how fast things are, or will be: plan, doctor, bench, profile."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxtp.cli.options import Alias, Engine, Flag, Model, ModelFlag, one_model, writable
from jaxtp.cli.parse import parse
from jaxtp.config.quantization import Quantization


@dataclass(frozen=True)
class Plan:
    """Every way to run a model on given GPUs: what fits, what it costs, which is best and why. Needs no GPU."""

    model: Model = None
    """Preset (llama-3.1-70b), "demo", or checkpoint folder, of which config.json is read."""
    named_model: ModelFlag = None
    """The same."""
    gpus: str | None = None
    """Such as 8xH100, or 2x8xH100 for two nodes of eight."""
    measured: Path | None = None
    """Instead: the machine that `jaxtp doctor --profile` wrote this file on, with the rates that it measured."""
    task: Literal["generate", "train"] = "generate"
    objective: Literal["latency", "throughput", "memory"] | None = None
    """What is best; default latency to generate, throughput to train."""
    batch: int | None = None
    """Prompts at once (default 1; for throughput the largest power of two that fits, up to 256), or rows of an update (default
    64)."""
    prompt_len: int | None = None
    """Tokens of a prompt; default 1024, or what the model takes."""
    output_len: int | None = None
    """Tokens of a completion; default 256, or what the model takes."""
    seq_len: int | None = None
    """Tokens of a row to train on; default 4096, or what the model takes."""
    max_model_len: int | None = None
    """Tokens of a request at most, for the concurrency; default prompt and output."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    quantization: Quantization | None = None
    """int8, fp8, int4: generate with the weights of the layers in so few bits."""
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = "auto"
    """int8, fp8: generate with keys and values in 8 bits."""
    gpu_memory_utilization: float | None = None
    """Share of each GPU that may be used; default 0.9 to generate, 0.95 to train."""
    interconnect: str | None = None
    """What joins the GPUs of a node: nvlink, pcie, or a link of --gpu-file; default the best that they have."""
    network: str | None = None
    """What joins nodes: infiniband (the default), infiniband-hdr, ethernet-100, or a link of --gpu-file."""
    gpu_file: Path | None = None
    """YAML with more GPUs, or other figures of known ones, and with links."""
    tp_across_nodes: Flag = False
    """Let tensor parallelism go over the network."""
    all: Flag = False
    """Show every layout that can be, not the best of each mesh alone."""
    json: Flag = False
    """Print all of it as JSON, with every layout that cannot be and why."""
    plot: Path | None = None
    """Write a picture: latency against throughput, or where the time of a training step goes."""
    compile: Flag = False
    """Compile the best plan's programs for these GPUs, and show the predictions beside what the compiler says."""
    virtual: Flag = False
    """With --compile: for virtual CPU devices instead."""

    def run(self) -> None:
        """Plans and prints."""
        from jaxtp.planner import plan

        model = one_model(self.model, self.named_model, verb="plan")
        self._check()
        shown = {
            "model",
            "named_model",
            "gpus",
            "measured",
            "gpu_memory_utilization",
            "all",
            "json",
            "plot",
            "compile",
            "virtual",
        }
        asked: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in shown}
        asked = {name: value for name, value in asked.items() if value is not None}
        from jaxtp.planner.cluster import measured

        where = measured(self.measured) if self.measured else str(self.gpus)
        plans = plan(model, where, utilization=self.gpu_memory_utilization, **asked)
        if self.plot:
            plans.draw().savefig(self.plot, dpi=150)
        if self.json:
            print(json.dumps(plans.records(), indent=1))
        else:
            plans.print(every=self.all)
        if self.compile:
            self._compile(plans.best)

    def _check(self) -> None:
        """Raises ValueError for flags that contradict each other, FileNotFoundError for a folder that is not there."""
        writable("--plot", self.plot)
        if bool(self.gpus) == bool(self.measured):
            raise ValueError("give either --gpus, such as 8xH100, or --measured FILE")
        if self.virtual and not self.compile:
            raise ValueError("--virtual says what to --compile for")
        if self.json and self.compile:
            raise ValueError("--json and --compile exclude one another")
        of_generation = [name for name in ("prompt_len", "output_len", "max_model_len") if getattr(self, name) is not None]
        if self.task == "train" and of_generation:
            raise ValueError(f"--{of_generation[0].replace('_', '-')} is of generation; --task train has --seq-len")
        if self.task == "generate" and self.seq_len is not None:
            raise ValueError("--seq-len is of --task train; generation has --prompt-len and --output-len")
        if self.measured and (self.interconnect or self.network or self.gpu_file):
            raise ValueError("--measured has its own links and rates; --interconnect, --network and --gpu-file go with --gpus")
        if self.compile and not self.virtual:
            from jaxtp.audit.targets import check_compiler

            check_compiler()

    def _compile(self, best: Any) -> None:
        from jaxtp import use_virtual_devices

        if self.virtual:
            use_virtual_devices(best.split.size)
        from jaxtp.audit.check import check

        check(best, virtual=self.virtual).print()


@dataclass(frozen=True)
class Doctor:
    """What this machine's devices are, what joins them, how fast both are, and what is odd about them."""

    tensor_parallel_size: Annotated[int | None, Alias(aliases=["-tp"])] = None
    """Devices of the axis tp; default all that the others leave."""
    pipeline_parallel_size: Annotated[int, Alias(aliases=["-pp"])] = 1
    """Devices of the axis pp."""
    data_parallel_size: Annotated[int, Alias(aliases=["-dp"])] = 1
    """Devices of the axis dp."""
    profile: Path | None = None
    """Write what was found as JSON, for `jaxtp plan --measured`."""
    plot: Path | None = None
    """Write a picture of the bus bandwidths."""
    largest: int | None = None
    """MiB of the largest arrays that collectives are timed with; default 256, on virtual devices 16."""
    virtual_devices: int | None = None
    """Look at this many virtual CPU devices."""

    def run(self) -> None:
        """Measures and prints."""
        from jaxtp import make_mesh, use_virtual_devices

        writable("--profile", self.profile)
        writable("--plot", self.plot)
        if self.largest is not None and self.largest < 1:
            raise ValueError(f"--largest {self.largest} must be at least 1 MiB")
        if self.virtual_devices is not None:
            use_virtual_devices(self.virtual_devices)
        from jaxtp.audit.doctor import MIB, examine

        tp = -1 if self.tensor_parallel_size is None else self.tensor_parallel_size
        mesh = make_mesh(dp=self.data_parallel_size, pp=self.pipeline_parallel_size, tp=tp)
        found = examine(mesh, largest=None if self.largest is None else self.largest * MIB)
        for name, version in found.versions.items():
            print(f"{name}: {version}")
        print(f"topology: {found.topology}\n")
        found.print()
        if self.profile:
            found.save(self.profile)
        if self.plot:
            found.draw().savefig(self.plot, dpi=150)


@dataclass(frozen=True)
class Bench:
    """Time generation on random tokens of fixed lengths, as vLLM's benchmarks do; or a server (jaxtp bench serve --help)."""

    kind: tyro.conf.Positional[Literal["latency", "throughput"]]
    """latency: one batch, again and again. throughput: many prompts, as fast as they go."""
    model: Model = None
    """Checkpoint folder, hub id, or with --load-format dummy a preset."""
    named_model: ModelFlag = None
    """The same."""
    batch_size: int = 8
    """Prompts of latency's batch."""
    num_prompts: int = 64
    """Prompts of throughput."""
    input_len: int = 128
    """Tokens of a prompt."""
    output_len: int = 128
    """Tokens of a completion."""
    num_iters: int = 3
    """How often it is done; the best counts."""
    json: Path | None = None
    """Write the figures there."""
    compare: Path | None = None
    """Figures of another run, to set beside these."""
    engine: tyro.conf.OmitArgPrefixes[Engine] = field(default_factory=Engine)

    def run(self) -> None:
        """Times and prints."""
        import logging

        if self.compare and not self.compare.exists():
            raise FileNotFoundError(f"--compare: there is no {self.compare}")
        writable("--json", self.json)
        from jaxtp.audit import bench

        before = bench.read(self.compare) if self.compare else None
        llm = self.engine.llm(one_model(self.model, self.named_model, verb=f"bench {self.kind}"))
        logging.getLogger("jaxtp").setLevel(logging.WARNING)
        count = self.batch_size if self.kind == "latency" else self.num_prompts
        found = bench.measure(llm, kind=self.kind, prompts=count, input_len=self.input_len, output_len=self.output_len,
                              iterations=self.num_iters)  # fmt: skip
        dataclasses.replace(found, before=before).print()
        if self.json:
            found.save(self.json)


@dataclass(frozen=True)
class Profile:
    """Where the time of prefill and decode steps goes, or of training steps: by part, beside what the planner says."""

    model: Model = None
    """Checkpoint folder, hub id, or with --load-format dummy a preset; or the YAML file of a training run, whose settings
    may follow (--parallel.tp 2)."""
    named_model: ModelFlag = None
    """The same."""
    batch_size: int = 8
    """Prompts at once."""
    input_len: int = 128
    """Tokens of a prompt."""
    steps: int = 32
    """Decode steps, or training steps."""
    trace: Path | None = None
    """Keep the trace there (.json.gz), for ui.perfetto.dev."""
    plot: Path | None = None
    """Write a picture: every device over time, and the parts."""
    engine: tyro.conf.OmitArgPrefixes[Engine] = field(default_factory=Engine)
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()

    def run(self) -> None:
        """Profiles and prints."""
        model = one_model(self.model, self.named_model, verb="profile")
        writable("--trace", self.trace)
        writable("--plot", self.plot)
        if Path(model).suffix in (".yaml", ".yml"):
            found = self._training(model)
        else:
            if self.overrides:
                raise ValueError(f"{self.overrides[0]} is a setting of a training run; {model} is no YAML file of one")
            llm = self.engine.llm(model)
            from jaxtp.audit.profile import profile

            found = profile(llm, batch=self.batch_size, input_len=self.input_len, steps=self.steps, trace=self.trace)
        found.print()
        if self.plot:
            found.draw().savefig(self.plot, dpi=150)

    def _training(self, run: str) -> Any:
        from jaxtp import compilation_cache, train, use_virtual_devices

        if self.engine.no_compilation_cache:
            compilation_cache.switch_off()
        engine = dataclasses.replace(self.engine, no_compilation_cache=False)
        if (self.batch_size, self.input_len, engine) != (8, 128, Engine()):
            raise ValueError(
                f"{run} says itself how the run is laid out; only its own settings (--parallel.tp 2) and "
                "--steps, --trace, --plot go with it"
            )
        config = parse(train.TrainConfig, self.overrides, prog=f"jaxtp profile {run}", default=train.load(run))
        if config.parallel.virtual_devices:
            use_virtual_devices(config.parallel.virtual_devices)
        from jaxtp.audit.profile import profile_training

        return profile_training(train.Run(config), steps=self.steps, trace=self.trace)
