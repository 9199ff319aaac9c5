"""The way of the weights: the policy's ranks and the engines in one group, joined anew when an engine is."""

from __future__ import annotations

from dataclasses import dataclass, field

from ray.actor import ActorHandle

from actors.engine_calls import RemoteEngineCalls
from actors.group import ActorGroup
from rlhf_ray.weights.sync import Backend, TransferSpec


@dataclass
class Transfer:
    """
    Fields:
        timeout: seconds for each single wait in joining and sending.
        joined: the engines that are in the group.
    """

    policy: ActorGroup
    engines: ActorGroup
    backend: Backend
    tensor_parallel_size: int
    timeout: float
    joined: list[ActorHandle] = field(default_factory=list)

    def join(self) -> None:
        """Let everyone join who is there now, unless they have.

        Raises:
            WeightSyncError: somebody did not.
        """
        if self.joined == self.engines.handles:
            return
        self.joined = []
        self.engines.wait_until_built()
        handles = list(self.engines.handles)
        address, port = self.policy.address().rsplit(":", 1)
        spec = TransferSpec(
            backend=self.backend,
            num_receivers=len(handles) * self.tensor_parallel_size,
            master_address=address,
            master_port=int(port),
            timeout=self.timeout,
        )
        calls = [
            RemoteEngineCalls(handle, self.engines.label(rank), self.engines.timeout)
            for rank, handle in enumerate(handles)
        ]
        self.policy.call("connect", calls, spec, self.tensor_parallel_size).result()
        self.joined = handles
