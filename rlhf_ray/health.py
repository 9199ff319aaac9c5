"""Whether an actor may be given work: a pure state machine, driven by whoever watches the actor.

    starting -> stale -> healthy <-> suspect        and from anywhere -> dead -> starting
            `--------------^

An engine whose weights come from a trainer is stale when it is built: it holds those of the model's folder,
or none. It may be given work when it has received the current ones. Whatever has its weights from its folder
is healthy at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class State(StrEnum):
    STARTING = "starting"
    STALE = "stale"
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    DEAD = "dead"


class Event(StrEnum):
    BUILT = "built"
    """It has answered that it is ready."""
    WEIGHTS = "weights"
    """It has received the current weights."""
    SILENCE = "silence"
    """It has given no sign of life for a while."""
    SIGN = "sign"
    """It has given one."""
    DEATH = "death"
    """Its process or its machine is gone, or it has been silent for too long."""
    START = "start"
    """A new process takes its place."""


_NEXT: dict[tuple[State, Event], State] = {
    (State.STARTING, Event.BUILT): State.HEALTHY,
    (State.STALE, Event.WEIGHTS): State.HEALTHY,
    (State.HEALTHY, Event.WEIGHTS): State.HEALTHY,
    (State.SUSPECT, Event.WEIGHTS): State.SUSPECT,
    (State.HEALTHY, Event.SILENCE): State.SUSPECT,
    (State.SUSPECT, Event.SIGN): State.HEALTHY,
    (State.DEAD, Event.START): State.STARTING,
    **{(state, Event.DEATH): State.DEAD for state in State},
    # What is not in service is not suspected: it has deadlines of its own.
    **{(state, Event.SILENCE): state for state in State if state is not State.HEALTHY},
    **{(state, Event.SIGN): state for state in State if state is not State.SUSPECT},
}


@dataclass(frozen=True)
class Health:
    """
    Fields:
        needs_weights: whether a trainer publishes to it.
    """

    needs_weights: bool = False
    state: State = State.STARTING

    def after(self, event: Event) -> Health:
        """
        Raises:
            ValueError: that cannot happen to an actor in this state.
        """
        if (self.state, event) not in _NEXT:
            raise ValueError(f"{event} happened to an actor that is {self.state}")
        state = _NEXT[self.state, event]
        if event is Event.BUILT and self.needs_weights:
            state = State.STALE
        return replace(self, state=state)

    @property
    def is_in_service(self) -> bool:
        """Whether work may be sent to it; what has no weights to wait for takes it while it starts."""
        if self.state is State.STARTING:
            return not self.needs_weights
        return self.state in (State.HEALTHY, State.SUSPECT)
