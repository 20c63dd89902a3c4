"""When all-reduces in 8 bits pay: by the link, the rows and tp. What they send and compute is `parallel.compressed`'s."""

from __future__ import annotations

from jaxtp.parallel.compressed import GROUP, choose_form
from jaxtp.planner.collectives import Collective
from jaxtp.planner.cost import LAUNCH, Machine
from jaxtp.planner.prediction import Plan
from jaxtp.planner.work import Generation, prompt_steps

WORTH = 0.05  # of the time to the first token, from which it is recommended
KERNELS = {"one step": 4, "two steps": 10}  # more than an all-reduce's (compiled for H200s at tp 8)
SENT = (GROUP + 2) / GROUP  # bytes of a number, with its share of a scale


def seconds(machine: Machine, tokens: int) -> tuple[float, float]:
    """Of one sum over tp (and cp) of so many tokens on each device: as it is, and in 8 bits."""
    n, over, axes, seconds = machine.split.ways, machine.split.summed, machine.split.axes, machine.cluster.seconds
    numbers = tokens * machine.config.hidden_size
    plain = seconds(Collective("all-reduce", over, "", machine.size * numbers, n), axes)
    size, form = round(numbers * SENT), choose_form(numbers, n)
    one = form == "one step"
    kinds = [("all-gather", n * size)] if one else [("all-to-all", size), ("all-gather", size)]
    sent = sum(seconds(Collective(kind, over, "", whole, n), axes) for kind, whole in kinds)
    # the shares read, what is sent written, what comes read, the sum written
    moved = numbers * ((machine.size + 2 + n) if one else (machine.size + 6)) + numbers * machine.size
    return plain, sent + KERNELS[form] * LAUNCH + moved / machine.bandwidth


def advice(plan: Plan) -> str | None:
    """A line that recommends it for a plan's prompts; None where it does not pay."""
    if plan.split.ways == 1 or not isinstance(plan.task, Generation) or plan.split.sequence_parallel:
        return None
    sums, saved = 2 * plan.split.stages(plan.config).slots, 0.0
    for step, times in prompt_steps(plan.config, plan.split, plan.task).items():
        plain, coded = seconds(plan.machine, step.tokens)
        saved += times * sums * (plain - coded)
    whole = plan.prefill.total
    if saved < WORTH * whole:
        return None
    return (
        f"{plan.split.told()}: compress_all_reduce='int8' would save {1e3 * saved:,.0f} of the {1e3 * whole:,.0f} ms to the "
        "first token (its error: docs/quantisation.md)"
    )
