"""Files that start a cluster: their size is the placement's, and they keep to the schemas of their makers."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from launch.cli import main, parse
from launch.manifests.nodes import Nodes, gpus_wanted, size
from rlhf_ray.config.loading import load_config, with_overrides
from rlhf_ray.errors import UserError
from tests.kuberay_schema import BY_KIND

EIGHT = [f"placement.{role}.gpus=1" for role in ("policy", "critic", "engine", "reference", "reward")]
SIZED = [*EIGHT, "placement.policy.count=8", "placement.engine.count=5"]
"""8 + 1 + 5 + 1 + 1 GPUs in the online stage."""

NODES = ["--nodes", "2", "--gpus-per-node", "8"]
KUBERAY = ["--image", "registry.example/rlhf:1", "--volume-claim", "models"]


def printed(capsys: pytest.CaptureFixture[str], kind: str, *words: str) -> str:
    assert main(["cluster", kind, "quickstart", *words]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], kind: str, *words: str) -> str:
    assert main(["cluster", kind, "quickstart", *words]) == 2
    return capsys.readouterr().err.removeprefix("rlhf-ray: ")


def sized(*overrides: str, **options: int | None) -> Nodes:
    given = {"nodes": None, "gpus_per_node": None, "cpus_per_node": None, "memory_per_node": None}
    return size(load_config("quickstart", overrides), **{**given, **options})


def test_the_size_is_the_placements() -> None:
    assert sized(*SIZED) == Nodes(count=2, gpus=8, cpus=64, memory_gib=512)
    assert sized(*SIZED, gpus_per_node=4, cpus_per_node=12, memory_per_node=99) == Nodes(4, 4, 12, 99)
    assert sized(*EIGHT) == Nodes(count=1, gpus=5, cpus=40, memory_gib=320)
    assert sized(*[word.replace("=1", "=0") for word in EIGHT]) == Nodes(1, 0, 8, 64)
    assert sized(nodes=3, gpus_per_node=0) == Nodes(3, 0, 8, 64)


def test_roles_that_a_run_does_not_have_take_nothing() -> None:
    """A quickstart of GRPO has no critic; with adapters the policy is its own reference."""
    without = ["online.algorithm=grpo", "online.num_generations=2", "training.lora.rank=4"]
    assert sized(*EIGHT, *without).gpus == 3
    assert sized(*EIGHT, *without, "online.reference.path=some/model").gpus == 4


RECIPES = sorted(Path(str(files("configs"))).glob("*gpu.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_asks_for_the_gpus_of_its_name(recipe: Path) -> None:
    (named,) = re.findall(r"-(\d+)gpu", recipe.stem)
    config = load_config(recipe)
    assert gpus_wanted(config) == int(named)
    # A part of a shared device is not another device.
    roles = [name for name in type(config.placement).model_fields if name != "mode"]
    assert gpus_wanted(with_overrides(config, [f"placement.{role}.gpus=0.2" for role in roles])) == int(named)


def test_roles_that_share_devices_take_those_of_the_largest() -> None:
    shared = ["training.zero_stage=2", "placement.policy.count=8", "placement.engine.count=3"]
    wide = "engine.tensor_parallel_size=4"
    assert sized("placement.mode=colocated", *shared).gpus == 8
    assert sized("placement.mode=colocated", *shared, wide) == Nodes(2, 8, 64, 512)
    served = ["placement.engine.count=1", wide, "placement.reference.count=3"]
    assert sized("placement.mode=colocated", *shared, *served) == Nodes(1, 8, 64, 512), "three ranks"
    served.append("placement.reference.backend=vllm")
    assert sized("placement.mode=colocated", *shared, *served) == Nodes(2, 8, 64, 512), "three engines"
    assert sized("placement.mode=disaggregated", *shared, wide, gpus_per_node=4) == Nodes(5, 4, 32, 256)
    assert sized("placement.mode=colocated", *shared, nodes=3, gpus_per_node=0) == Nodes(3, 0, 8, 64)
    with pytest.raises(UserError, match=r"asks for 8 GPUs, and 1 x 4 are 4"):
        sized("placement.mode=colocated", *shared, nodes=1, gpus_per_node=4)


def test_what_the_configuration_does_not_say_must_be_said() -> None:
    with pytest.raises(
        UserError, match=r"auto for policy, engine, reward, critic, .*--nodes and --gpus-per-node"
    ):
        sized(nodes=2)
    with pytest.raises(UserError, match=r"auto for critic\)"):
        sized(*[word for word in SIZED if "critic" not in word])
    with pytest.raises(UserError, match=r"asks for 16 GPUs, and 1 x 8 are 8; raise --nodes"):
        sized(*SIZED, nodes=1, gpus_per_node=8)


def documents(text: str) -> list[dict[str, Any]]:
    found = list(yaml.safe_load_all(text))
    for document in found:
        jsonschema.validate(document, BY_KIND[document["kind"]])
    return found


def test_a_ray_job(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["online.num_steps=5", *NODES, *KUBERAY, "--secret", "keys", "--max-retries", "3"]
    config_map, job = documents(printed(capsys, "kuberay", *words))
    assert yaml.safe_load(config_map["data"]["config.yaml"])["pipeline"][0] == "sft"
    spec = job["spec"]
    assert spec["backoffLimit"] == 3
    driver = shlex.split(spec["entrypoint"])
    assert driver[:4] == ["python", "-m", "launch", "train"]
    parse(driver[3:])
    assert driver[4:] == [
        "/etc/rlhf-ray/config.yaml",
        "online.num_steps=5",
        "output_dir=/shared/runs/quickstart",
        "resume=auto",
        "cluster.address=auto",
    ]
    cluster = spec["rayClusterSpec"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    (group,) = cluster["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    assert (group["replicas"], worker["resources"]["limits"]["nvidia.com/gpu"]) == (2, "8")
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    assert head["envFrom"] == worker["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert {"name": "shared", "mountPath": "/shared"} in worker["volumeMounts"]
    config = next(mount for mount in head["volumeMounts"] if mount["name"] == "config")
    assert config["mountPath"] == "/etc/rlhf-ray"


def test_a_ray_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--gpus-per-node", "0", "--nodes", "2", "--image", "x", "--name", "mine"]
    (cluster,) = documents(printed(capsys, "raycluster", *words))
    assert cluster["metadata"]["name"] == "mine"
    (worker,) = cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    assert worker["resources"]["limits"] == {"cpu": "8", "memory": "64Gi"}


def test_the_schema_refuses_what_kuberay_would() -> None:
    """Otherwise the tests above would prove little."""
    cluster = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "x"}, "spec": {}}
    for spec in ({}, {"headGroupSpec": {"rayStartParams": {"num-cpus": 0}, "template": {}}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**cluster, "spec": spec}, BY_KIND["RayCluster"])


def test_pods_see_the_volume_and_the_hub_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "How?"}\n')
    words = [*NODES, *KUBERAY]
    err = refused(capsys, "kuberay", *words, "online.dataset.path=prompts.jsonl")
    assert err.startswith("online.dataset.path=prompts.jsonl: is on this machine, where no pod sees it")
    on_volume = ["online.dataset.path=/shared/prompts.jsonl", "model.path=/shared/lm"]
    assert "/shared/lm" in printed(capsys, "kuberay", *words, *on_volume)
    assert "--volume-claim" in refused(capsys, "kuberay", *NODES, "--image", "x")
    assert "--image" in refused(capsys, "kuberay", *NODES, "--volume-claim", "x")


SBATCH = {
    "account",
    "cpus-per-task",
    "exclusive",
    "gpus-per-node",
    "job-name",
    "mem",
    "nodes",
    "ntasks-per-node",
    "open-mode",
    "output",
    "partition",
    "requeue",
    "time",
}
"""Of https://slurm.schedmd.com/sbatch.html, those that we use."""
SRUN = {"nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "nodelist"}
"""Of https://slurm.schedmd.com/srun.html."""


def test_a_slurm_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup = ". .venv/bin/activate"
    options = ["--time", "12:00:00", "--partition", "gpu", "--account", "me", "--setup", setup]
    text = printed(capsys, "slurm", "online.num_steps=5", *NODES, *options)
    script = tmp_path / "run.sh"
    script.write_text(text)
    subprocess.run(["bash", "-n", script], check=True)
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert len(directives) == text.count("#SBATCH")
    assert set(directives) == SBATCH
    assert [directives[f"{name}per-node"] for name in ("gpus-", "ntasks-")] == ["8", "1"]
    assert directives["nodes"] == "2"
    assert f"\n{setup}\n" in text
    for command in re.findall(r"srun ((?:--\S+ )*)", text):
        assert set(re.findall(r"--([\w-]+)=", command)) <= SRUN


def test_ray_understands_the_slurm_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run by bash with programs in place of Slurm's that print what they are given; then Ray's parsers."""
    from click import Context
    from ray.scripts.scripts import start
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args, symmetric_run

    programs = {
        "scontrol": "printf 'node-1\\nnode-2\\n'",
        "srun": 'case "$*" in *hostname*) echo "10.0.0.1 10.0.0.2";; *) printf "%s\\n" "$@";; esac',
        "python": "echo 0123",
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name, value in (("JOB_NODELIST", "n[1-2]"), ("JOB_NUM_NODES", "2"), ("CPUS_PER_TASK", "64")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(tmp_path))
    script = tmp_path / "run.sh"
    script.write_text(printed(capsys, "slurm", *NODES))
    done = subprocess.run(["bash", script], capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    words = words[words.index("ray") + 1 :]
    separator = words.index("--")
    assert words[0] == "symmetric-run"
    before, driver = words[1:separator], words[separator + 1 :]
    context = symmetric_run.make_context("symmetric-run", list(before))
    assert (context.params["address"], context.params["min_nodes"]) == ("10.0.0.1:6379", 2)
    left = curate_and_validate_ray_start_args(list(before))
    started: Context = start.make_context("start", list(left))
    assert (started.params["num_cpus"], started.params["num_gpus"]) == (64, 8)
    assert driver == [
        *("python", "-m", "launch", "train", "quickstart", "resume=auto", "cluster.address=auto")
    ]
    parse(driver[3:])


def autoscaler_schema() -> dict[str, Any]:
    import ray

    path = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    return dict(json.loads(path.read_text()))


def test_an_autoscaler_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    aws = ["--provider", "aws", "--instance-type", "p5.48xlarge", "--setup", "pip install x", "--image", "y"]
    local = ["--head-ip", "10.0.0.1", "--worker-ip", "10.0.0.2", "--ssh-user", "me"]
    trees = {}
    for name, options in (("aws", aws), ("local", local)):
        output = tmp_path / f"{name}.yaml"
        assert printed(capsys, "autoscaler", *NODES, *options, "--output", str(output)) == ""
        trees[name] = yaml.safe_load(output.read_text())
        jsonschema.validate(trees[name], autoscaler_schema())
        validate_config(prepare_config(trees[name]))
    worker = trees["aws"]["available_node_types"]["worker"]
    assert (worker["min_workers"], worker["resources"]) == (2, {"CPU": 64, "GPU": 8})
    assert trees["local"]["provider"]["worker_ips"] == ["10.0.0.2"]


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        ("slurm", [*NODES, "--image", "x"], "cluster slurm has no use for --image"),
        ("slurm", [], "placement: does not say how many GPUs the run has"),
        ("autoscaler", [*NODES, "--head-ip", "a"], "the run wants 2 machines, and 1 are named"),
        ("autoscaler", [*NODES, "--provider", "aws"], "name them with --instance-type"),
        ("slurm", [*NODES, "online.num_step=3"], "did you mean num_steps?"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], kind: str, words: list[str], said: str) -> None:
    assert said in refused(capsys, kind, *words)
