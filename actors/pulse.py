"""Signs of life: every process of a role gives one every few seconds, from a thread of its own.

Ray notices at once when a process dies, and in half a minute when a machine does. It does not notice one
that is there and does nothing: stopped, swapped out, or stuck in native code that keeps the interpreter's
lock. Its thread is silent then. (One that waits for ever without that lock still gives signs; a call's own
deadline ends that.)

The signs go into the key-value store of Ray's head, since the process's own queue of calls stands still while
it works.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from contextlib import suppress

import ray
from ray.exceptions import RayError
from ray.experimental import internal_kv

PERIOD = 2.0
"""Seconds between two signs."""
_NAMESPACE = b"rlhf_ray.pulse"


def give_signs() -> None:
    """Begin to, in the process of an actor."""
    key = ray.get_runtime_context().get_actor_id()

    def beat() -> None:
        for number in itertools.count():
            # Where the head cannot be reached, it is not this process that is at fault.
            with suppress(RayError, RuntimeError, OSError):
                internal_kv._internal_kv_put(str(key), str(number), namespace=_NAMESPACE)
            time.sleep(PERIOD)

    threading.Thread(target=beat, name="pulse", daemon=True).start()


class Pulse:
    """The signs, as one process hears them, by its own clock.

    Args:
        limit: seconds of silence after which a process counts as dead.
    """

    def __init__(self, limit: float = math.inf) -> None:
        self.limit = limit
        self._heard: dict[str, tuple[bytes | None, float]] = {}
        self._next_look = 0.0

    @property
    def is_due(self) -> bool:
        """Whether it is time to listen again."""
        if not math.isfinite(self.limit) or time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + PERIOD
        return True

    def silence(self, actor_id: str) -> float:
        """Seconds for which this actor has given no sign while somebody listened."""
        now = time.monotonic()
        before, since = self._heard.get(actor_id, (None, now))
        try:
            sign = internal_kv._internal_kv_get(actor_id, namespace=_NAMESPACE)
        except (RayError, RuntimeError, OSError):
            return 0.0
        if sign != before:
            since = now
        self._heard[actor_id] = sign, since
        return now - since
