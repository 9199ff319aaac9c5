"""What ends a run: Ctrl-C, the SIGTERM of `kill` and of schedulers, and its own deadline.

Both signals are set for the time of a block, whatever they were before: a shell script starts what it puts in
the background with Ctrl-C ignored, and Ray takes SIGTERM for itself.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Both raise KeyboardInterrupt: there is nothing to save yet."""
    is_stopping = False

    def on_signal(*_: object) -> None:
        nonlocal is_stopping
        is_stopping = True
        raise KeyboardInterrupt

    with _handled_by(on_signal):
        try:
            yield
        except BaseException:
            if is_stopping:
                # Native code that is being imported makes an error of its own of it.
                raise KeyboardInterrupt from None
            raise


@contextmanager
def stopping_after_a_step(say: Callable[[str], None]) -> Iterator[Event]:
    """The first sets the event, and the loop saves after its step; the second stops at once."""
    event = Event()

    def on_signal(number: int, _: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        again = "press it again" if number == signal.SIGINT else "send it again"
        say(f"{NAMES[signal.Signals(number)]}: stopping after this step and saving; {again} to stop at once")

    with _handled_by(on_signal):
        yield event


@contextmanager
def stopping_by_itself(seconds: float, event: Event, say: Callable[[str], None]) -> Iterator[None]:
    """After so many seconds the event is set, unless it is by then."""

    def stop() -> None:
        if not event.is_set():
            say("deadline: stopping after this step and saving")
            event.set()

    timer = threading.Timer(min(max(0.0, seconds), threading.TIMEOUT_MAX), stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _handled_by(handler: Callable[[int, object], None]) -> Iterator[None]:
    if not _may_set_handlers():
        yield
        return
    earlier = {number: signal.signal(number, handler) for number in NAMES}
    try:
        yield
    finally:
        for number, before in earlier.items():
            # None: a handler of native code, which Python cannot put back.
            signal.signal(number, before or signal.SIG_DFL)


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Around what starts Ray: SIGTERM ends that at once, as KeyboardInterrupt, and afterwards means what it
    meant before. Ray's own handler, set as it starts, exits the process with the signal's number."""
    if not _may_set_handlers():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as ending:
        if ending.code == signal.SIGTERM:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _may_set_handlers() -> bool:
    """Signals belong to the main thread; a notebook's worker thread goes without."""
    return threading.current_thread() is threading.main_thread()
