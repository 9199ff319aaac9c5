"""The control plane of one engine actor, for the trainer's sender: `rlhf_ray.weights.sync.EngineCalls`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from ray.actor import ActorHandle

from actors.calls import OpenCalls, Remote


@dataclass(frozen=True)
class RemoteEngineCalls:
    """Fields: handle: of the engine's `Host`; name: for messages; timeout: seconds for each call."""

    handle: ActorHandle
    name: str
    timeout: float

    def init_weight_transfer_engine(self, init_info: dict[str, object]) -> Remote[None]:
        return self._call("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> Remote[None]:
        return self._call("start_weight_update")

    def update_weights(self, update_info: dict[str, object]) -> Remote[None]:
        return self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str) -> Remote[None]:
        return self._call("finish_weight_update", weight_version)

    def _call(self, method: str, *args: object) -> Remote[None]:
        handle = cast(Any, self.handle)  # Ray gives the methods of a handle no types
        value, done = handle.call.options(num_returns=2).remote(method, 0, *args)
        # Listed by itself: the sender waits for all engines, and only then says which have failed.
        calls = OpenCalls()
        calls.add(f"{self.name}.{method}", done)
        return Remote(value, (done,), calls, self.timeout)
