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
    yield _row("parameters, 10^9", [_billions(stage["parameters"], 2) for stage in stages])
    for part in plan["parts"]:
        values = [stage[part] for stage in stages]
        if any(values):
            yield _row(part.replace("_", " "), [_billions(value) for value in values])
    yield _row("all", [_billions(stage["total"]) for stage in stages])
    yield ""
    most, size = max(stage["total"] for stage in stages), plan["gpu_bytes"]
    room = f"{plan['usable_bytes'] / 1e9:.1f} GB ({size / 1e9:.1f} GB less {plan['reserved_share']:.0%} reserved)"
    if plan["fits"]:
        yield f"fits: {_billions(most)} GB of {room}"
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
    yield f"operations         {_rounded(work['operations_per_step'] / 1e15, 2)} PFLOP a step{share}{more}"
    yield f"pipeline bubble    {work['bubble']:.1%} of a step with {work['microbatches']} microbatches"
    if work["hours"] is not None:
        hours = _rounded(work["hours"], 1)
        yield f"time               {hours} hours at an MFU of {work['mfu']:.0%} ({plan['precision']})"
    yield f"checkpoint         {_billions(work['checkpoint_bytes'])} GB"
    if work["store_bytes"] is not None:
        yield f"target stores      {_billions(work['store_bytes'], 2)} GB"
    if work["encoder_hours"] is not None:
        yield f"encoder            {_rounded(work['encoder_hours'], 2)} hours for all segments"
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


def _billions(value: float, digits: int = 1) -> str:
    return _rounded(value / 1e9, digits)


def _rounded(value: float, digits: int) -> str:
    """A number with this many decimals; a small one, of which they would show nothing, with two significant digits."""
    return f"{value:.2g}" if 0 < value < 0.5 * 10**-digits else f"{value:,.{digits}f}"


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"
