"""What to change where a plan does not fit: keys and values, each tried by planning again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_ray.config.document import Document
from rlhf_ray.config.loading import dump_config, with_overrides
from rlhf_ray.config.parts import Parts
from rlhf_ray.config.placement_checks import placement_mistakes
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.planning.plan import Plan, make_plan

MOST_CHANGES = 6
Change = tuple[str, ...]
"""Overrides that belong together."""


@dataclass(frozen=True)
class Advice:
    """Fields: changes: overrides, in order. plan: with all of them."""

    changes: tuple[str, ...]
    plan: Plan


def advise(plan: Plan) -> Advice | None:
    """The fewest changes found, of two ways to look for them; what helps most where nothing suffices. None
    where nothing helps."""
    found = [each for each in (_step_by_step(plan), _pruned(plan, _everything(plan))) if each is not None]
    fitting = [each for each in found if each.plan.fits]
    if fitting:
        return min(fitting, key=lambda each: len(each.changes))
    return min(found, key=lambda each: each.plan.excess, default=None)


def _step_by_step(plan: Plan) -> Advice | None:
    """In each round the first change that makes it fit, or else the one that helps most."""
    changes: tuple[str, ...] = ()
    best = plan
    for _ in range(MOST_CHANGES):
        found: Advice | None = None
        for change in _candidates(best):
            tried = _planned(best, change)
            if tried is None:
                continue
            if tried.fits:
                return _pruned(plan, _last_words((*changes, *change)))
            least = best.excess if found is None else found.plan.excess
            if tried.excess < 0.98 * least:
                found = Advice((*changes, *change), tried)
        if found is None:
            break
        changes, best = found.changes, found.plan
    return Advice(_last_words(changes), best) if changes else None


def _last_words(changes: Change) -> Change:
    """Without those that later ones overrule."""
    by_key = {change.partition("=")[0]: change for change in changes}
    return tuple(by_key.values())


def _everything(plan: Plan) -> Change:
    """All that saves memory and keeps what is computed, on all devices."""
    if not plan.machine.device.is_gpu:
        return ("training.gradient_checkpointing=true",)
    num, mode = plan.machine.num_devices, plan.config.placement.mode
    lagging = plan.online is not None and plan.online.max_lag > 0
    parts = plan.config.engine.tensor_parallel_size
    while (
        2 * plan.cast.policy.parameters / parts > 0.5 * plan.machine.device.memory
        and parts < plan.machine.per_node
    ):
        parts *= 2
    generating = max(parts, num // 2) if lagging else num
    training = num - generating if lagging else num
    if mode == "auto":
        mode = "disaggregated" if lagging else "colocated"
    counts = [role for role in ("policy", "critic") if role in plan.layout.roles] + _in_parts(plan)
    return (
        f"placement.mode={mode}",
        "training.zero_stage=3",
        "training.gradient_checkpointing=true",
        *(f"placement.{role}.count={training}" for role in counts if training),
        f"engine.tensor_parallel_size={parts}",
        f"placement.engine.count={max(1, generating // parts)}",
        "engine.gpu_memory_utilization=0.8",
        f"training.tokens_per_micro_batch={max(1024, plan.cast.longest)}",
        "training.offload_optimizer=cpu",
    )


def _pruned(plan: Plan, changes: Change) -> Advice | None:
    """Without those that are not needed, the costliest, which come last, left out first."""
    best = _planned(plan, changes)
    if best is None or not best.fits:
        return None if best is None or best.excess >= plan.excess else Advice(changes, best)
    for change in reversed(changes):
        fewer = tuple(each for each in changes if each != change)
        tried = _planned(plan, fewer)
        if tried is not None and tried.fits:
            changes, best = fewer, tried
    return Advice(changes, best)


def _planned(plan: Plan, change: Change) -> Plan | None:
    """With the change; None where it cannot be made."""
    try:
        config = with_overrides(plan.config, list(change))
    except ConfigError:
        return None
    if _contradicts(config):
        return None
    return make_plan(config, plan.machine, plan.assumed, plan.stage)


def _contradicts(config: RunConfig) -> bool:
    document = Document()
    document.tree = dump_config(config)  # type: ignore[assignment]
    return any(path[0] in ("placement", "training") for path, _ in placement_mistakes(Parts.of(document)))


def _candidates(plan: Plan) -> Iterator[Change]:
    """What costs least comes first."""
    training, engine, placement = plan.config.training, plan.config.engine, plan.config.placement
    if not training.gradient_checkpointing:
        yield ("training.gradient_checkpointing=true",)
    for stage in range(training.zero_stage + 1, 4):
        yield (f"training.zero_stage={stage}",)
    budget = training.tokens_per_micro_batch
    for tokens in (budget // 2, budget // 4, budget // 8):
        if tokens >= max(256, plan.cast.longest):
            yield (f"training.tokens_per_micro_batch={tokens}",)
    if plan.machine.device.is_gpu:
        yield from _on_gpus(plan)
    elif engine.cpu_kv_cache_gib > 0.25:
        yield (f"engine.cpu_kv_cache_gib={engine.cpu_kv_cache_gib / 2:g}",)
    for role in _in_parts(plan):
        if training.zero_stage == 3 and getattr(placement, role).count == 1:
            yield (f"placement.{role}.count={placement.policy.count}",)
    if plan.cast.reference is not None and plan.online is not None and plan.online.recipe.kl_coef == 0:
        yield ("online.track_kl=false",)
    if plan.machine.device.is_gpu and training.offload_optimizer == "none":
        yield ("training.offload_optimizer=cpu",)
    if plan.machine.device.is_gpu and training.offload_parameters == "none" and training.zero_stage == 3:
        yield ("training.offload_optimizer=cpu", "training.offload_parameters=cpu")
    if training.lora is None:
        yield ("training.lora.rank=16",)


def _in_parts(plan: Plan) -> list[str]:
    """Frozen models that more ranks would make smaller on each."""
    placement = plan.config.placement
    found = {"reference": plan.cast.reference is not None, "reward": bool(plan.cast.rewards)}
    return [
        role for role, is_there in found.items() if is_there and getattr(placement, role).backend == "torch"
    ]


def _on_gpus(plan: Plan) -> Iterator[Change]:
    """Other devices, more of them, or another share of them for the engine."""
    engine, placement, num = plan.config.engine, plan.config.placement, plan.machine.num_devices
    roles = plan.layout.roles
    if placement.mode == "auto" and len(roles) > 1:
        spread = [*(role for role in ("policy", "critic") if role in roles), *_in_parts(plan)]
        counts = [f"placement.{role}.count={num}" for role in spread]
        engines = max(1, num // engine.tensor_parallel_size)
        zero = ["training.zero_stage=1"] if plan.config.training.zero_stage == 0 else []
        yield ("placement.mode=colocated", *zero, *counts, f"placement.engine.count={engines}")
    for role in ("policy", "critic", *_in_parts(plan)):
        section = getattr(placement, role)
        if role in roles and section.count < num and placement.mode == "colocated":
            yield (f"placement.{role}.count={num}",)
    if "engine" not in roles:
        return
    for share in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2):
        if abs(share - engine.gpu_memory_utilization) > 0.05:
            yield (f"engine.gpu_memory_utilization={share}",)
    parts = 2 * engine.tensor_parallel_size
    if plan.cast.policy.heads % parts == 0 and parts <= plan.machine.per_node:
        fewer = max(1, placement.engine.count // 2)
        yield (f"engine.tensor_parallel_size={parts}", f"placement.engine.count={fewer}")
