"""The tables of `megatron-sfr plan`, in Markdown, so that a README can hold them as they are printed."""

from collections.abc import Iterator
from typing import Any

SHOWN = 10
"""Layouts of a sweep that are printed."""


def memory_table(plan: dict[str, Any]) -> Iterator[str]:
    """The memory of each stage, in GB of 10^9 bytes, and whether it fits."""
    layout = plan["layout"]
    yield f"{plan['recipe']} on {layout['world']} {plan['gpu'].upper()}: {layout['text']}"
    yield ""
    stages = plan["stages"]
    yield "| GB on a GPU of | " + " | ".join(f"stage {stage['stage']}" for stage in stages) + " |"
    yield "|---" * (1 + len(stages)) + "|"
    yield _row("layers", [str(stage["layers"]) for stage in stages])
    yield _row("parameters, 10^9", [f"{stage['parameters'] / 1e9:.2f}" for stage in stages])
    for part in plan["parts"]:
        values = [stage[part] for stage in stages]
        if any(values):
            yield _row(part.replace("_", " "), [_gigabytes(value) for value in values])
    yield _row("all", [f"{stage['total'] / 1e9:.1f}" for stage in stages])
    yield ""
    most, size = max(stage["total"] for stage in stages), plan["gpu_bytes"]
    room = f"{plan['usable_bytes'] / 1e9:.1f} GB ({size / 1e9:.1f} GB less {plan['reserved_share']:.0%} reserved)"
    if plan["fits"]:
        yield f"fits: {most / 1e9:.1f} GB of {room}"
        return
    yield f"does not fit: {most / 1e9:.1f} GB of {room}"
    for remedy in plan["remedies"]:
        yield f"  would fit with {remedy}"
    if not plan["remedies"]:
        yield "  no single flag makes it fit: take more GPUs (--nodes), or compare layouts (--sweep)"


def work_lines(plan: dict[str, Any]) -> Iterator[str]:
    """The work of a run, one line for each number."""
    work = plan["work"]
    yield ""
    steps = "unknown here" if work["steps"] is None else f"{work['steps']:,}"
    yield f"steps              {steps}; {work['tokens_per_step']:,} tokens each"
    if work["steps_per_epoch"] is not None:
        yield f"epoch              {work['steps_per_epoch']:,.1f} steps, {work['tokens_per_epoch']:,} tokens"
    share = f", {work['head_share']:.2%} of it in the flow head" if work["head_share"] else ""
    more = f"; recomputation adds {work['recomputed']:.0%}" if work["recomputed"] else ""
    yield f"operations         {work['operations_per_step'] / 1e15:,.2f} PFLOP a step{share}{more}"
    yield f"pipeline bubble    {work['bubble']:.1%} of a step with {work['microbatches']} microbatches"
    if work["hours"] is not None:
        yield f"time               {work['hours']:,.1f} hours at an MFU of {work['mfu']:.0%} ({plan['precision']})"
    yield f"checkpoint         {work['checkpoint_bytes'] / 1e9:,.1f} GB"
    if work["store_bytes"] is not None:
        yield f"target stores      {work['store_bytes'] / 1e9:,.2f} GB"
    if work["encoder_hours"] is not None:
        yield f"encoder            {work['encoder_hours']:,.2f} hours for all segments"
    if plan["assumed"]:
        yield f"assumed            {', '.join(plan['assumed'])}"


def sweep_table(plan: dict[str, Any]) -> Iterator[str]:
    """The layouts that fit, the fastest first."""
    found = plan["sweep"]
    yield ""
    yield f"layouts of {plan['layout']['world']} GPUs that fit: {len(found)}"
    yield "(time relative to the operations alone: recomputation and bubble; communication is not counted)"
    yield ""
    yield "| time | GB | layout |"
    yield "|---|---|---|"
    for each in found[:SHOWN]:
        yield f"| {each['time']:.3f} | {each['bytes'] / 1e9:.1f} | {each['layout']} |"


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.1f}" if value == 0 or value >= 5e7 else f"{value / 1e9:.2g}"


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"
