"""What Ctrl-C and SIGTERM do, sent to this very process."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest

from launch.interrupts import sigterm_kept, stopping_after_a_step, stopping_at_once

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def ignored() -> Iterator[None]:
    """As in what a shell script starts with `&`; a signal that nobody handles does not end the tests."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    yield
    found = [signal.getsignal(number) for number in SIGNALS]
    for number, handler in before.items():
        signal.signal(number, handler)
    assert found == [signal.SIG_IGN, signal.SIG_IGN], "every block leaves the signals as they were"


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_before_a_run_a_signal_stops_at_once(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), stopping_at_once():
        send(number)
        pytest.fail("goes on")


def test_an_import_that_a_signal_breaks_is_a_stop_too() -> None:
    with pytest.raises(KeyboardInterrupt), stopping_at_once():
        try:
            send(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ImportError("datetime") from None
    with pytest.raises(ImportError), stopping_at_once():
        raise ImportError("datetime")


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (signal.SIGINT, "Ctrl-C: stopping after this step and saving; press it again to stop at once"),
        (signal.SIGTERM, "SIGTERM: stopping after this step and saving; send it again to stop at once"),
    ],
)
@pytest.mark.parametrize("second", SIGNALS)
def test_the_first_signal_asks_and_the_second_stops(
    first: signal.Signals, said: str, second: signal.Signals
) -> None:
    heard: list[str] = []
    with stopping_at_once():
        with stopping_after_a_step(heard.append) as event:
            assert not event.is_set()
            send(first)
            assert event.is_set()
            with pytest.raises(KeyboardInterrupt):
                send(second)
        assert heard == [said]
        with pytest.raises(KeyboardInterrupt):
            send(first)


def take_sigterm() -> None:
    """As `ray.init` does."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))


def test_what_takes_sigterm_gives_it_back() -> None:
    with stopping_after_a_step(print) as event:
        with sigterm_kept():
            take_sigterm()
        send(signal.SIGTERM)
        assert event.is_set()


def test_sigterm_interrupts_what_takes_it() -> None:
    with stopping_after_a_step(print) as event:
        with pytest.raises(KeyboardInterrupt), sigterm_kept():
            take_sigterm()
            send(signal.SIGTERM)
        assert not event.is_set()


def test_other_exits_are_passed_on() -> None:
    with pytest.raises(SystemExit, match="1"), sigterm_kept():
        sys.exit(1)
