"""The control plane of one engine actor, for the trainer's sender: `rlhf_ray.weights.sync.EngineCalls`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.failures import failure_of
from rlhf_ray.errors import WorkerLost


@dataclass(frozen=True)
class Asked:
    """An engine's answer. It is listed nowhere: the sender waits for all engines, and only then says which
    have failed."""

    name: str
    done: ray.ObjectRef
    timeout: float

    def result(self) -> None:
        """
        Raises:
            WorkerLost: the engine's process died, or did not answer in time.
            RlhfRayError: what the engine raised.
        """
        if not ray.wait([self.done], timeout=self.timeout)[0]:
            raise WorkerLost(f"no answer within {self.timeout:g} s from {self.name}")
        try:
            ray.get(self.done)
        except RayError as error:
            raise failure_of(self.name, error) from error


@dataclass(frozen=True)
class RemoteEngineCalls:
    """Fields: handle: of the engine's `Host`; name: for messages; timeout: seconds for each call."""

    handle: ActorHandle
    name: str
    timeout: float

    def init_weight_transfer_engine(self, init_info: dict[str, object]) -> Asked:
        return self._call("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> Asked:
        return self._call("start_weight_update")

    def update_weights(self, update_info: dict[str, object]) -> Asked:
        return self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str) -> Asked:
        return self._call("finish_weight_update", weight_version)

    def _call(self, method: str, *args: object) -> Asked:
        handle = cast(Any, self.handle)  # Ray gives the methods of a handle no types
        name = f"{self.name}.{method}"
        _, done = handle.call.options(num_returns=2, name=name).remote(method, 0, *args)
        return Asked(name, done, self.timeout)
