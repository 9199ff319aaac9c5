"""Placement on a cluster of several nodes, whose GPUs are a number and nothing else."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from actors.group import ActorGroup
from launch.placement import Placement, RoleDemand
from rlhf_ray.config.schema import ClusterSection, PlacementSection, RoleSection
from rlhf_ray.errors import ResourceError
from rlhf_ray.reporting.run_folder import RunFolder

pytestmark = [pytest.mark.actors, pytest.mark.usefixtures("three_nodes")]

JOINED = ClusterSection(address="auto", start_timeout=60)
STORE = 100 << 20


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[None]:
    """A head without GPUs, and two nodes of four: `left`, and `right`."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    head = {"num_cpus": 2, "temp_dir": str(folder), "include_dashboard": False, "object_store_memory": STORE}
    cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
    for side in ("left", "right"):
        cluster.add_node(num_cpus=4, num_gpus=4, object_store_memory=STORE, labels={"side": side})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def demand(name: str, count: int = 1, width: int = 1, **section: object) -> RoleDemand:
    return RoleDemand(name, RoleSection.model_validate({"count": count, "cpus": 0.1, **section}), 0, width)


def side_of(node: str) -> str:
    return next(str(each["Labels"].get("side")) for each in ray.nodes() if each["NodeID"] == node)


class Found:
    """Where the actors of a role are. Fields: sides: of the cluster; gpus: each actor's own."""

    def __init__(self, group: ActorGroup) -> None:
        group.build("tests.actors.workers:Worker", [{"rank": rank} for rank in range(len(group))], 60)
        group.wait_until_built()
        places = [json.loads(str(call.result())) for call in group.call_each("place", [()] * len(group))]
        self.sides = [side_of(place["node"]) for place in places]
        self.gpus = [place["gpus"] for place in places]


@pytest.fixture
def placed(tmp_path: Path) -> Iterator[object]:
    """Makes a placement, which is released at the end."""
    made: list[Placement] = []

    def make(*demands: RoleDemand, **section: object) -> Placement:
        made.append(Placement(demands, JOINED, RunFolder(tmp_path), PlacementSection.model_validate(section)))
        return made[-1]

    yield make
    for placement in made:
        placement.release()


def test_ranks_on_nodes(placed) -> None:  # type: ignore[no-untyped-def]
    """Two ranks on each of two nodes, the first two together; and labels keep the engine on one side."""
    placement = placed(demand("policy", 4, nodes=2), demand("engine", labels={"side": "right"}))
    policy, engine = Found(placement.start("policy")), Found(placement.start("engine"))
    assert placement.node_numbers("policy") == (0, 0, 1, 1)
    assert policy.sides in (["left", "left", "right", "right"], ["right", "right", "left", "left"])
    for pair in (policy.gpus[:2], policy.gpus[2:]):
        assert len({gpu for own in pair for gpu in own}) == 2, "a GPU each"
    assert engine.sides == ["right"]


def test_colocated_roles_meet_on_their_devices(placed) -> None:  # type: ignore[no-untyped-def]
    placement = placed(demand("policy", 2), demand("engine", 2), demand("reward"), mode="colocated")
    policy, engine = placement.start("policy"), placement.start("engine")
    assert placement.devices(policy) == placement.devices(engine) == ["all/0", "all/1"]
    trained, generating = Found(policy), Found(engine)
    assert trained.sides == generating.sides and trained.gpus == generating.gpus
    assert trained.gpus[0] != trained.gpus[1]
    assert set(placement.devices(placement.start("reward"))) < {"all/0", "all/1"}


def test_disaggregated_roles_never_meet(placed) -> None:  # type: ignore[no-untyped-def]
    placement = placed(
        demand("policy", 2, labels={"side": "left"}),
        demand("critic", 2),
        demand("engine", 2, labels={"side": "!left"}),
        mode="disaggregated",
    )
    found = {role: Found(placement.start(role)) for role in ("policy", "critic", "engine")}
    assert found["policy"].sides == found["critic"].sides == ["left", "left"]
    assert found["policy"].gpus == found["critic"].gpus
    assert found["engine"].gpus[0] != found["engine"].gpus[1]
    # Nodes without GPUs, and without the label, are "not left" too; only the right one has GPUs.
    assert found["engine"].sides == ["right", "right"]


def test_a_tensor_parallel_engine_spans_bundles(placed) -> None:  # type: ignore[no-untyped-def]
    """Its workers are for vLLM to start; the actor tells it where."""
    placement = placed(demand("policy", 2), demand("engine", 2, width=2), mode="colocated")
    group = placement.start("engine")
    group.build("tests.actors.workers:Worker", [{}, {}], 60)
    group.wait_until_built()
    names = ("VLLM_RAY_BUNDLE_INDICES", "VLLM_RAY_PER_WORKER_GPUS")
    bundles, shares = (
        [call.result() for call in group.call_each("environment", [(name,)] * 2)] for name in names
    )
    assert sorted(int(index) for text in bundles for index in str(text).split(",")) == [0, 1, 2, 3]
    assert shares == ["0.5", "0.5"]
    assert group.gpus() == [], "the workers have them"
    assert len(set(placement.devices(group))) == 4


def test_an_actor_starts_again_in_its_bundle(placed) -> None:  # type: ignore[no-untyped-def]
    placement = placed(demand("engine", 2, strategy="STRICT_SPREAD"))
    group = placement.start("engine")
    before = Found(group)
    assert set(before.sides) == {"left", "right"}
    ray.kill(group.handles[1])
    group.handles[1] = placement.start_one("engine", 1)
    after = Found(group)
    assert (after.sides, after.gpus) == (before.sides, before.gpus)


def test_labels_that_no_node_has_are_named(tmp_path: Path) -> None:
    alone = ClusterSection(start_timeout=1)
    with pytest.raises(ResourceError) as caught:
        Placement([demand("policy", labels={"side": "top"})], alone, RunFolder(tmp_path))
    assert "Missing: a node with the labels side=top (nodes have side=left, side=right)." in str(caught.value)


def test_what_is_scattered_is_said_by_node(tmp_path: Path) -> None:
    """Three GPUs in use on each side: two are free, and not together."""
    first = Placement([demand("policy", 2, gpus=3)], JOINED, RunFolder(tmp_path))
    short = ClusterSection(address="auto", start_timeout=2)
    with pytest.raises(ResourceError) as caught:
        Placement([demand("engine", gpus=2)], short, RunFolder(tmp_path))
    said = str(caught.value)
    assert said.startswith("after 2 s: placement: asks for 1 x engine with 0.1 CPU, 2 GPU. The cluster has ")
    assert "the resources exist but are in use, or not together on single nodes (free on each node: " in said
    assert said.count("1 of 4 GPU") == 2
    first.release()
    with pytest.raises(ResourceError, match=r"Missing: a single node with 0\.1 CPU, 5 GPU"):
        Placement([demand("engine", gpus=5)], short, RunFolder(tmp_path))
