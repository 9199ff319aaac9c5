"""The times of a step's stages, and of the step that they make up."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_ray.config.schema import OnlineSection, RunConfig
from rlhf_ray.planning.layout import Layout
from rlhf_ray.planning.memory import Phase
from rlhf_ray.planning.roles import Cast
from rlhf_ray.planning.timing import Clock, updates_of

AFTER: dict[Phase, tuple[Phase, ...]] = {
    "generate": (),
    "reward": ("generate",),
    "reference": ("generate",),
    "log-probs": ("generate",),
    "values": ("generate",),
    "critic": ("reward", "reference", "log-probs", "values"),
    "policy": ("reward", "reference", "log-probs", "values"),
    "sync": ("policy", "critic"),
}
"""Phase -> what it needs."""


@dataclass(frozen=True)
class StageTime:
    """Fields: role: whose devices it takes. computing: seconds of them that are not communication.
    because: what its time depends on."""

    phase: Phase
    role: str
    seconds: float
    computing: float
    because: str

    @property
    def communication(self) -> float:
        return self.seconds - self.computing


def time_stages(
    config: RunConfig, online: OnlineSection, cast: Cast, layout: Layout, clock: Clock, slots: int
) -> tuple[StageTime, ...]:
    training, engine, placement = config.training, config.engine, config.placement
    engines = placement.engine.count
    found = [_generation(config, cast, clock, engines, slots)]
    if cast.rewards:
        ranks, spans = placement.reward.count, layout.spans_nodes("reward")
        is_served = placement.reward.backend == "vllm"
        devices = engine.tensor_parallel_size if is_served else ranks
        computing = sum(clock.forward(shape, devices, with_head=False) for shape in cast.rewards)
        gathers = sum(clock.gathers_to_look(shape, training, ranks, spans=spans) for shape in cast.rewards)
        found.append(StageTime("reward", "reward", computing + gathers, computing, "operations of a pass"))
    if cast.judge is not None:
        seconds = clock.forward(cast.judge, engine.tensor_parallel_size)
        found.append(StageTime("reward", "judge", seconds, seconds, "reading prompts"))
    if cast.reference is not None or cast.reference_in_policy:
        role = "reference" if cast.reference is not None else "policy"
        ranks = placement.reference.count if cast.reference is not None else placement.policy.count
        is_served = cast.reference is not None and placement.reference.backend == "vllm"
        width = engine.tensor_parallel_size if is_served else 1
        computing = clock.forward(cast.reference or cast.policy, ranks * width)
        gathers = 0.0
        if cast.reference is not None and ranks > 1 and not is_served:
            gathers = clock.gathers_to_look(
                cast.reference, training, ranks, spans=layout.spans_nodes("reference")
            )
        found.append(StageTime("reference", role, computing + gathers, computing, "operations of a pass"))
    if online.old_logprobs == "forward":
        found.append(_look("log-probs", "policy", config, cast, layout, clock))
    if cast.critic is not None:
        found.append(_look("values", "critic", config, cast, layout, clock))
        found.append(_update("critic", config, online, cast, layout, clock))
    found.append(_update("policy", config, online, cast, layout, clock))
    same = layout.share("policy", "engine")
    across = len({d // layout.per_node for r in ("policy", "engine") for d in layout[r].all_devices}) > 1
    seconds = clock.publish(cast.policy, training, same_device=same, spans=across)
    found.append(StageTime("sync", "policy", seconds, 0.0, "weights over the link"))
    return tuple(found)


def _generation(config: RunConfig, cast: Cast, clock: Clock, engines: int, slots: int) -> StageTime:
    seconds = clock.generate(cast.policy, config.engine, engines, slots)
    speed = clock.speed(cast.policy, config.engine)
    alone = clock.work.lengths.longest * speed.step(1)
    because = "reading weights and KV cache for every token"
    if alone > 0.6 * seconds:
        because = "the longest answer, for which all wait"
    elif speed.compute * slots > speed.weights + slots * speed.read:
        because = "multiplying: the batch is large"
    return StageTime("generate", "engine", seconds, seconds, because)


def _look(phase: Phase, role: str, config: RunConfig, cast: Cast, layout: Layout, clock: Clock) -> StageTime:
    shape = cast.critic if role == "critic" else cast.policy
    assert shape is not None
    ranks = getattr(config.placement, role).count
    computing = clock.forward(shape, ranks, with_head=role == "policy")
    gathers = 0.0
    if config.training.zero_stage == 3:
        gathers = clock.gathers_to_look(shape, config.training, ranks, spans=layout.spans_nodes(role))
    return StageTime(phase, role, computing + gathers, computing, _reason(computing, gathers))


def _update(
    role: Phase, config: RunConfig, online: OnlineSection, cast: Cast, layout: Layout, clock: Clock
) -> StageTime:
    shape = cast.critic if role == "critic" else cast.policy
    assert shape is not None
    training = config.training
    ranks = getattr(config.placement, role).count
    epochs, updates = online.num_ppo_epochs, updates_of(online)
    trained = shape.trained(training.lora)
    computing = clock.train(shape, training, ranks, epochs, head=role == "policy")
    computing += updates * clock.update(trained, ranks if training.zero_stage else 1)
    gathers = clock.gathers(
        shape, training, ranks, spans=layout.spans_nodes(role), updates=updates, epochs=epochs
    )
    return StageTime(role, role, computing + gathers, computing, _reason(computing, gathers))


def _reason(computing: float, gathers: float) -> str:
    return "operations" if computing >= gathers else "moving weights and gradients between devices"


def step_seconds(times: tuple[StageTime, ...], layout: Layout, max_lag: int) -> float:
    """Each stage begins when what it needs is done and its devices are free; those that share devices take
    turns. With lag, engines with devices of their own go on meanwhile."""
    if max_lag > 0 and not any(layout.share("engine", r) for r in layout.roles if r != "engine"):
        generation = sum(time.seconds for time in times if time.phase == "generate")
        sync = sum(time.seconds for time in times if time.phase == "sync")
        rest = tuple(time for time in times if time.phase not in ("generate", "sync"))
        return max(generation, _chain(rest, layout)) + sync
    return _chain(times, layout)


def _chain(times: tuple[StageTime, ...], layout: Layout) -> float:
    free = dict.fromkeys(range(layout.num_devices), 0.0)
    done: dict[Phase, float] = {}
    for time in times:
        roles = ("policy", "engine") if time.phase == "sync" else (time.role,)
        devices = {device for role in roles for device in layout[role].all_devices}
        needs = [done.get(phase, 0.0) for phase in AFTER[time.phase]]
        begin = max([*needs, *(free[device] for device in devices)], default=0.0)
        end = begin + time.seconds
        done[time.phase] = max(done.get(time.phase, 0.0), end)
        free.update(dict.fromkeys(devices, end))
    return max(done.values(), default=0.0)
