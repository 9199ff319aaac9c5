"""The state machine of an actor: every state, every event, and every word of up to six events."""

from __future__ import annotations

import itertools

import pytest

from rlhf_ray.health import Event, Health, State

S, E = State, Event

# Rows: state; columns: built, weights, silence, sign, death, start. None: cannot happen.
TABLE: dict[State, tuple[State | None, ...]] = {
    S.STARTING: (S.HEALTHY, None, S.STARTING, S.STARTING, S.DEAD, None),
    S.STALE: (None, S.HEALTHY, S.STALE, S.STALE, S.DEAD, None),
    S.HEALTHY: (None, S.HEALTHY, S.SUSPECT, S.HEALTHY, S.DEAD, None),
    S.SUSPECT: (None, S.SUSPECT, S.SUSPECT, S.HEALTHY, S.DEAD, None),
    S.DEAD: (None, None, S.DEAD, S.DEAD, S.DEAD, S.STARTING),
}


def test_the_table_is_whole() -> None:
    assert set(TABLE) == set(State)
    assert all(len(row) == len(Event) for row in TABLE.values())


@pytest.mark.parametrize("needs_weights", [False, True])
@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_every_event_in_every_state(state: State, event: Event, needs_weights: bool) -> None:
    expected = TABLE[state][list(Event).index(event)]
    health = Health(needs_weights, state)
    if expected is None:
        with pytest.raises(ValueError, match=f"{event} happened to an actor that is {state}"):
            health.after(event)
        return
    if event is E.BUILT and needs_weights:
        expected = S.STALE
    assert health.after(event) == Health(needs_weights, expected)


def after(health: Health, word: tuple[Event, ...]) -> Health | None:
    for event in word:
        try:
            health = health.after(event)
        except ValueError:
            return None
    return health


WORDS = [word for length in range(7) for word in itertools.product(Event, repeat=length)]


def test_no_engine_serves_that_has_not_received_weights_since_it_was_built() -> None:
    possible = 0
    for word in WORDS:
        health = after(Health(needs_weights=True), word)
        if health is None:
            continue
        possible += 1
        since = word[len(word) - word[::-1].index(E.DEATH) :] if E.DEATH in word else word
        is_current = E.BUILT in since and E.WEIGHTS in since[since.index(E.BUILT) :]
        assert health.is_in_service == is_current, word
    assert possible > 1000


def test_what_needs_no_weights_serves_unless_it_is_dead() -> None:
    for word in WORDS:
        health = after(Health(), word)
        if health is not None:
            assert health.is_in_service == (health.state is not S.DEAD), word


def test_a_life() -> None:
    word = (E.BUILT, E.WEIGHTS, E.SILENCE, E.SIGN, E.SILENCE, E.DEATH, E.START, E.BUILT, E.WEIGHTS)
    health, seen = Health(needs_weights=True), []
    for event in word:
        health = health.after(event)
        seen.append(health.state)
    assert seen == [
        S.STALE,
        S.HEALTHY,
        S.SUSPECT,
        S.HEALTHY,
        S.SUSPECT,
        S.DEAD,
        S.STARTING,
        S.STALE,
        S.HEALTHY,
    ]
