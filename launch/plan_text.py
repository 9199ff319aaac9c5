"""A plan as tables and boxes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from rlhf_ray.planning.advice import Advice
from rlhf_ray.planning.hardware import GIB
from rlhf_ray.planning.measured import accuracy
from rlhf_ray.planning.memory import KINDS, Phase
from rlhf_ray.planning.plan import SPARE, DevicePlan, Plan, named, runs
from rlhf_ray.planning.published import validation
from rlhf_ray.planning.schedules import Simulated

SHOWN: dict[str, tuple[Phase, ...]] = {
    "generate": ("generate",),
    "score": ("reward", "reference", "log-probs", "values"),
    "train critic": ("critic",),
    "train policy": ("policy",),
    "sync": ("sync",),
}
"""Columns of the table of phases; of several the largest is shown."""
BAR = 20


def show(plan: Plan, advice: Advice | None, console: Console) -> None:
    console.print(escape(_headline(plan)), highlight=False)
    console.print(_roles(plan))
    if plan.machine.device.is_gpu:
        console.print(_phases(plan))
    for panel in _boxes(plan):
        console.print(panel)
    if plan.times:
        console.print(_times(plan))
        console.print(escape(_speed(plan)), highlight=False)
    for line in _verdict(plan, advice):
        console.print(escape(line), highlight=False, soft_wrap=True)


def _headline(plan: Plan) -> str:
    shape, device, machine = plan.cast.policy, plan.machine.device, plan.machine
    size = shape.parameters / 1e9
    where = f"this machine ({device.memory / GIB:.1f} GiB of main memory)"
    if device.is_gpu:
        nodes = -(-machine.num_devices // machine.per_node)
        many = "" if nodes == 1 else f" on {nodes} nodes"
        where = f"{machine.num_devices} {device.name} of {device.memory / GIB:.1f} GiB{many}"
    return f"{plan.stage} of a model of {size:.3g} billion parameters on {where}"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f}" if num_bytes >= 0.05 * GIB else ("0" if num_bytes == 0 else "<0.1")


def _roles(plan: Plan) -> Table:
    table = Table(title="memory of each actor on a device, GiB at its largest", title_justify="left")
    table.add_column("role")
    table.add_column("actors", justify="right")
    for kind in KINDS:
        table.add_column(kind, justify="right")
    table.add_column("at once", justify="right")
    has_host = any(memory.host for memory in plan.memories)
    if has_host:
        table.add_column("in main memory", justify="right")
    for memory in plan.memories:
        placed = plan.layout[memory.role]
        width = len(placed.devices[0])
        actors = f"{len(placed.devices)}" + (f" x {width}" if width > 1 else "")
        cells = [memory.role, actors, *(_gib(memory.of_kind(kind)) for kind in KINDS), _gib(memory.peak)]
        table.add_row(*cells, *([_gib(memory.host)] if has_host else []))
    return table


def _phases(plan: Plan) -> Table:
    table = Table(title="memory of each device in each phase, GiB", title_justify="left")
    table.add_column("devices")
    for name in SHOWN:
        table.add_column(name, justify="right")
    table.add_column("may use", justify="right")
    table.add_column("fits")
    for device in plan.devices:
        peaks = (_gib(max(device.peaks[phase] for phase in phases)) for phases in SHOWN.values())
        verdict = "no" if device.excess else "yes"
        table.add_row(named(device.devices, plan.machine), *peaks, _gib(SPARE * device.capacity), verdict)
    return table


def _boxes(plan: Plan) -> Iterator[Panel]:
    """A box a node; nodes that hold the same share one."""
    if not plan.machine.device.is_gpu:
        (device,) = plan.devices
        yield Panel(
            _line("main memory", device, plan), title="this machine", title_align="left", expand=False
        )
        return
    size = plan.layout.per_node
    nodes: list[str] = []
    for node in range(-(-plan.layout.num_devices // size)):
        own = range(node * size, min((node + 1) * size, plan.layout.num_devices))
        lines = []
        for device in plan.devices:
            here = [number - node * size for number in device.devices if number in own]
            if here:
                lines.append((here[0], _line(f"GPU {runs(here)}", device, plan)))
        idle = [number - node * size for number in own if not plan.layout.on(number)]
        if idle:
            lines.append((idle[0], f"GPU {runs(idle)}: idle"))
        nodes.append("\n".join(line for _, line in sorted(lines)))
    for text, alike in groupby(enumerate(nodes), key=lambda numbered: numbered[1]):
        numbers = [number for number, _ in alike]
        title = f"node {numbers[0]}" if len(numbers) == 1 else f"each of nodes {runs(numbers)}"
        yield Panel(escape(text), title=title, title_align="left", expand=False)


def _line(name: str, device: DevicePlan, plan: Plan) -> str:
    share = min(1.0, device.peak / device.capacity)
    bar = "#" * round(BAR * share) + "." * (BAR - round(BAR * share))
    roles = []
    for role in dict.fromkeys(device.roles):
        width, count = len(plan.layout[role].devices[0]), device.roles.count(role)
        roles.append(
            role + (f" (1 over {width})" if width > 1 else "") + (f" x {count}" if count > 1 else "")
        )
    amount = f"{_gib(device.peak)} of {_gib(device.capacity)} GiB"
    return f"{name:<8} {bar} {amount:<20} {', '.join(roles)}"


def _times(plan: Plan) -> Table:
    title = "predicted seconds of each stage of a step, by roofline"
    table = Table(title=title, title_justify="left")
    for column in ("stage", "by", "seconds", "of it moving weights", "what it hangs on"):
        table.add_column(column, justify="right" if column.startswith(("seconds", "of")) else "left")
    for time in plan.times:
        moving = f"{time.communication:.3g}" if time.communication else ""
        table.add_row(time.phase, time.role, f"{time.seconds:.3g}", moving, time.because)
    table.add_section()
    table.add_row("a step", "", f"{plan.step:.3g}", "", "")
    return table


def _speed(plan: Plan) -> str:
    assert plan.clock is not None and plan.bottleneck is not None
    work, device = plan.clock.work, plan.machine.device
    per_device = work.tokens / plan.step / plan.machine.num_devices
    share = plan.bottleneck.seconds / plan.step
    unit = "GPU" if device.is_gpu else "machine"
    efficiency = plan.clock.efficiency
    return (
        f"bottleneck: {plan.bottleneck.phase} ({share:.0%} of a step): {plan.bottleneck.because}\n"
        f"{per_device:,.0f} tokens a second and {unit}; {plan.slots} answers at a time on an engine\n"
        f"assumed: prompts of {work.prompt:.0f} tokens, answers of {work.lengths.mean:.0f} in the mean with "
        f"a long tail up to {work.lengths.longest}; of the data sheet's peak {efficiency.train:.0%} in "
        f"training, {efficiency.forward:.0%} in forward passes, {efficiency.read:.0%} of memory bandwidth "
        f"with weights and {efficiency.cache:.0%} with the KV cache, {efficiency.move:.0%} of links"
    )


def _verdict(plan: Plan, advice: Advice | None) -> Iterable[str]:
    if plan.host:
        yield f"main memory of the fullest node: {plan.host / GIB:.0f} GiB of what waits or is offloaded"
    if plan.config.placement.mode == "auto" and not plan.layout.moves_out and _crowded(plan):
        yield (
            "placement.mode=auto gives every actor a part of a GPU, and ranks of one role may meet on it; "
            "colocated puts one of each role on a GPU"
        )
    yield accuracy()
    if plan.fits:
        yield "it fits"
        return
    yield "it does not fit:"
    yield from (f"  {problem}" for problem in plan.problems)
    if advice is None:
        yield "nothing that this command can change helps: take more devices, or a smaller model"
        return
    outcome = "with these changes it fits" if advice.plan.fits else "these changes help, and are not enough"
    yield f"{outcome} ({advice.plan.devices[0].peak / GIB:.1f} GiB on the first device):"
    yield "  " + " ".join(f"'{change}'" if " " in change else change for change in advice.changes)


def show_simulated(plan: Plan, found: Sequence[Simulated], console: Console) -> None:
    """Every speed-up beside what it costs in staleness, and what is left idle."""
    title = f"simulated schedules on {plan.machine.num_devices} {plan.machine.device.name}"
    table = Table(title=title, title_justify="left")
    columns = ("schedule", "engines:training", "s a step", "simulated speed-up", "busy", "full batches")
    for column in (*columns, "mean lag", "most", "given up", "length"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    base = found[0].outcome.step
    for each in found:
        outcome, own = each.outcome, each.schedule
        training = plan.machine.num_devices - own.generating
        split = f"{own.generating}:{training}" if own.generating else "in turn"
        table.add_row(
            own.name,
            split,
            f"{outcome.step:.3g}",
            f"{base / outcome.step:.2f} x",
            f"{outcome.busy:.0%}",
            f"{outcome.full:.0%}",
            f"{outcome.lag_mean:.2f}",
            str(outcome.lag_max),
            f"{outcome.given_up:.0%}",
            f"{outcome.length:.0%}",
        )
    console.print(table)
    meaning = (
        "all of this is simulated. busy: share of the devices' time with something to do; full batches: of "
        "it, what the same work takes with every engine full; lag: in versions of the weights; length: of "
        "what is trained on, against all answers: those that are done first are short. Whether a split fits "
        "in memory says a plan with its keys"
    )
    for line in (meaning, validation(), *(f"{each.schedule.name}: {each.keys}" for each in found[1:])):
        console.print(escape(line), highlight=False, soft_wrap=True)


def _crowded(plan: Plan) -> bool:
    on = (len(device.roles) for device in plan.devices)
    return plan.machine.device.is_gpu and any(count > 1 for count in on)
