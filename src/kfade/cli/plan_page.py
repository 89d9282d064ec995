"""The result of ``kfade plan`` as tables and notes."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from kfade.planning.arrange import FIT_STAGES
from kfade.planning.cost import EFFICIENCY, EIGH_FLOPS, EIGH_LIMIT
from kfade.runtime.counts import counted, rounded

SIZES = {
    "model": "model, or a device's shard of it",
    "factors": "Kronecker factors A and S, float32",
    "bases": "eigenbases, which replace the factors",
    "eigenvalues": "eigenvalues",
    "curvature": "curvature on disk: bases and eigenvalues",
    "vector": "gradient, direction or update, each",
    "activations": "activations that a forward pass keeps",
    "inputs": "layer inputs that a pass keeps (for eigenvalues and gradient)",
    "head": "vocabulary head, for a chunk of positions",
    "runtime": "Python and libraries",
}
STAGES = {
    "load": "model",
    "covariance": "sums of A and S",
    "eigh": "decompositions",
    "lambda": "eigenvalues in the eigenbasis",
    "gradient": "gradient of the forget objective",
    "step": "direction and its exact G-norm",
    "refine": "refinement of the direction by exact products",
    "check": "search for the step's size",
    "correct": "corrections after the last step",
    "exchange": "sums and bases between devices",
}
FITTED = ("load", *FIT_STAGES)


def page(plan: dict[str, Any]) -> list[Any]:
    """The parts of the page for a result of :func:`kfade.runs.plan`."""
    parameters = plan["parameters"]
    head = (
        f"{plan['model']}: {rounded(parameters['all'])} parameters in {plan['dtype']}; "
        f"{counted(plan['weights'], 'weight')} targeted, "
        f"{rounded(parameters['targeted'])} parameters"
    )
    return [head, _sizes(plan), _peaks(plan), _work(plan), *_notes(plan)]


def _sizes(plan: dict[str, Any]) -> Table:
    sequences, positions = plan["batch"]
    table = Table("object", "bytes", title=f"Sizes, batches of {sequences} x {positions} positions")
    table.columns[1].justify = "right"
    for name, text in SIZES.items():
        if plan["bytes"][name]:
            table.add_row(text, size(plan["bytes"][name]))
    return table


def _peaks(plan: dict[str, Any]) -> Table:
    grouped = plan["groups"] is not None and plan["groups"] > 1
    table = Table("stage", "", "all layers at once", title="Peak of a device by stage, first step")
    if grouped:
        table.add_column(f"in {plan['groups']} groups")
    for column in table.columns[2:]:
        column.justify = "right"
    for stage, peak in plan["peak_bytes"]["one_group"].items():
        row = [stage, STAGES[stage], _marked(peak, plan["memory"])]
        if grouped:
            row.append(_marked(plan["peak_bytes"]["planned"][stage], plan["memory"]))
        table.add_row(*row)
    return table


def _marked(peak: int, memory: int | None) -> str:
    """The size, with a mark if it exceeds the memory."""
    return size(peak) + (" !" if memory is not None and peak > memory else "")


def _work(plan: dict[str, Any]) -> Table:
    steps = counted(plan["work"]["steps"], "step")
    table = Table("stage", "TFLOP", "shares", title=f"Work of a run of {steps}")
    table.columns[1].justify = "right"
    for count in plan["seconds"]:
        table.add_column("1 device" if count == "1" else f"{count} devices", justify="right")
    stages = {**plan["flops"], **({"exchange": {}} if plan["devices"] > 1 else {})}
    for stage, kinds in stages.items():
        total = sum(kinds.values())
        shares = sorted(kinds.items(), key=lambda item: -item[1])
        text = ", ".join(f"{k} {100 * v / total:.0f} %" for k, v in shares if v >= 0.005 * total)
        times = [
            duration(seconds[stage]) if stage in seconds else ""
            for seconds in plan["seconds"].values()
        ]
        table.add_row(stage, f"{total / 1e12:,.4g}" if total else "", text, *times)
    if plan["seconds"]:
        totals = [duration(seconds["total"]) for seconds in plan["seconds"].values()]
        table.add_row("total", "", "", *totals)
    return table


def _notes(plan: dict[str, Any]) -> list[str]:
    work, speed, memory = plan["work"], plan["speed"], plan["memory"]
    fitted = f"{work['estimator']} on {work['retain_tokens']:,} retain tokens"
    notes = [
        f"{fitted} in {counted(plan['passes'], 'pass')}; {work['forget_tokens']:,} forget tokens; "
        f"sequences of {work['sequence_length']}"
        + ("; blocks run again in backward passes" if work["recompute"] else "")
    ]
    if speed is None:
        notes.append(
            "to predict seconds, give a device's --speed in TFLOP/s, or --measure this machine"
        )
    else:
        shares = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in EFFICIENCY.items())
        bandwidth = speed.get("bandwidth")
        notes.append(
            f"at {speed['products'] / 1e12:.4g} TFLOP/s ({speed['float32'] / 1e12:.4g} in float32"
            + (f", {bandwidth / 1e9:.3g} GB/s" if bandwidth else "")
            + f"), of which each kind of work reaches: {shares}; a decomposition of width d "
            f"counts as {EIGH_FLOPS} d³ flops, at most "
            f"{EIGH_LIMIT / 1e12:.0f} TFLOP/s"
        )
    least = plan["peak_bytes"]["smallest_groups"]
    stage = max(least, key=least.__getitem__)
    notes.append(
        f"layers fitted one at a time, a device must hold {size(least[stage])} ({stage}; its fit "
        f"{size(max(peak for name, peak in least.items() if name in FITTED))})"
    )
    if memory is None:
        notes.append("to get groups of layers that fit a device, give its --memory")
    elif plan["problem"] is not None:
        notes.append(f"does not fit {size(memory)}: {plan['problem']}")
    elif plan["over_memory"]:
        notes.append(
            f"the layers are fitted in {counted(plan['groups'], 'group')}, but {size(memory)} is "
            f"not enough for: {', '.join(plan['over_memory'])}"
        )
    else:
        elsewhere = ", vectors outside the device (--offload)" if plan["offload"] else ""
        groups = counted(plan["groups"], "group")
        notes.append(f"fits {size(memory)}, the layers in {groups}{elsewhere}")
    if plan["advice"] is not None:
        notes.append(f"it fits with {plan['advice']}")
    elif plan["problem"] is not None or plan["over_memory"]:
        notes.append("give fewer --layers, --dtype bfloat16, or --shard over several --devices")
    return notes


def size(count: float) -> str:
    """Bytes with three digits."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            value = count / unit
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {name}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """A duration in seconds, minutes or hours, with three digits."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
