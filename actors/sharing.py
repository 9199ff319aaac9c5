"""Roles that have the same devices: who works has them, and who waits keeps its memory elsewhere.

What a worker of such a role has to offer, besides its work:
    rest(): move to main memory what it has on the device; wake(weights_only): bring it back.
Where there is nothing to move, as on a CPU, both do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.calls import Remote, Task, Turns
from actors.group import ActorGroup, Timeline
from rlhf_ray.errors import RlhfRayError, WorkerLost

HAND_OVER = "hand_over"
"""The kind of call that moves memory."""
RECEIVER = "engine"
SENDING = ("connect", "publish")
"""Calls of the policy that reach into the receiver: its weights must be in place, and nothing else."""


class Devices:
    """Of a pool of roles."""

    def __init__(self) -> None:
        self.groups: list[SharingGroup] = []
        self._awake: dict[SharingGroup, bool] = {}
        """Those that are on the devices; True with their weights alone."""

    def give_to(self, group: SharingGroup, method: str | None = None) -> list[Remote[object]]:
        """Let all others rest, and wake the group; returns the calls that this takes.

        Args:
            method: that it will be asked for; None where it is about to be built.
        """
        receivers = [other for other in self.groups if other.name == RECEIVER and method in SENDING]
        moves = [other.move("rest") for other in self._awake if other not in (group, *receivers)]
        self._awake = {other: part for other, part in self._awake.items() if other in (group, *receivers)}
        for receiver in receivers:
            if receiver not in self._awake:
                moves.append(receiver.move("wake", True))
                self._awake[receiver] = True
        if method is not None and self._awake.get(group, True):
            moves.append(group.move("wake", False))
        self._awake[group] = False
        return moves


class SharingGroup(ActorGroup):
    """A role on devices that others use too. Its calls, and those of the others, run in turn."""

    def __init__(
        self,
        name: str,
        handles: Sequence[ActorHandle],
        turns: Turns,
        timeline: Timeline,
        timeout: float,
        devices: Devices,
        start: Callable[[int], ActorHandle] | None = None,
        lost_machine: Callable[[], WorkerLost | None] = lambda: None,
    ) -> None:
        assert turns.enabled, "calls of roles that share devices run in turn"
        super().__init__(name, handles, turns, timeline, timeout, start, lost_machine)
        self.devices = devices
        devices.groups.append(self)

    def move(self, method: str, *args: object) -> Remote[object]:
        return super().call(method, *args, kind=HAND_OVER)

    def build(
        self,
        factory: str,
        kwargs: Sequence[dict[str, object]],
        timeout: float,
        *,
        is_pure: bool = False,
        needs_weights: bool = False,
    ) -> None:
        """When the others are built and rest: each needs the devices to itself while it loads.

        An engine that needs weights is not replaced in its place: the policy would have to publish to it,
        and may have given the devices away in what it was asked since."""
        for group in self.devices.groups:
            if group is not self and group.is_begun:
                group.wait_until_built()
        for move in self.devices.give_to(self):
            move.result()
        is_pure = is_pure and not needs_weights
        super().build(factory, kwargs, timeout, is_pure=is_pure, needs_weights=needs_weights)

    @property
    def is_begun(self) -> bool:
        return bool(self._builds)

    def start_again(self, rank: int, failure: RlhfRayError) -> None:
        """When all that was asked before the first call that is lost has ended: then the devices are this
        role's, for either it was at work, or the others had been told to rest so that it could be."""
        try:
            ray.get(self.timeline.open.not_lost_with(self, rank), timeout=self.timeout)
        except RayError:
            raise failure from failure.__cause__
        super().start_again(rank, failure)

    def _server(self, task: Task) -> int:
        """Each rank has devices of its own, and nobody moves memory, or works, on those of another."""
        return task.rank

    def _begin(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """What is asked of the host alone (building, its address), and the moves, need no devices."""
        task = tasks[0]
        if task.method is not None and task.kind != HAND_OVER:
            self.devices.give_to(self, task.method)
        return super()._begin(tasks)
