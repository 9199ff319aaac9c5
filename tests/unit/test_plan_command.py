"""`rlhf-ray plan`, and the recipes for clusters."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from launch.cli import main
from launch.plan_text import show_simulated
from rlhf_ray.config.checks import load_checked
from rlhf_ray.config.loading import load_config, with_overrides
from rlhf_ray.config.schema import PlacementSection
from rlhf_ray.planning.advice import advise
from rlhf_ray.planning.hardware import GIB, cpu, gpu
from rlhf_ray.planning.layout import Wanted, lay_out
from rlhf_ray.planning.plan import Assumed, Machine, Plan, make_plan, runs
from rlhf_ray.planning.schedules import SCHEDULES, fleet_of, simulate_all

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = {
    "ppo-0.5b-1gpu": ("L40S", 1),
    "ppo-7b-8gpu": ("H100", 8),
    "grpo-7b-32gpu": ("H100", 32),
    "grpo-32b-32gpu": ("H100", 32),
    "ppo-70b-128gpu": ("H100", 128),
}
ON_64 = [f"placement.{role}.count=64" for role in ("policy", "critic", "reference")]


def plan(*words: str) -> int:
    return main(["plan", *words])


def test_every_recipe_is_here() -> None:
    assert {path.stem for path in CONFIGS.glob("*gpu.yaml")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_pass_check_and_fit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kind, count = RECIPES[name]
    load_checked(name)
    assert plan(name, "--gpus", str(count), "--gpu", kind) == 0


def test_a_70b_ppo_on_64_gpus(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    record = tmp_path / "plan.json"
    words = ["ppo-70b-128gpu", "--gpus", "64", *ON_64, "placement.engine.count=8", "--json", str(record)]
    assert plan(*words) == 0
    said = capsys.readouterr().out
    assert "70.6 billion parameters on 64 H100" in said and "each of nodes 1-7" in said
    found = json.loads(record.read_text())
    assert found["fits"] and found["roles"]["engine"]["devices"][1] == list(range(8, 16))
    # A 64th of 16 bytes a parameter, and the gathered layers and activations beside it.
    states = found["roles"]["policy"]["bytes"]
    assert states["optimizer"] == pytest.approx(12 * 70_553_706_496 / 64)
    assert found["step_seconds"] >= max(found["seconds"].values())


def test_what_does_not_fit_is_said_with_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("ppo-7b-8gpu", "--gpus", "8", "training.gradient_checkpointing=false") == 1
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("it does not fit:")
    assert "in the phase policy" in lines[start + 1]
    changes = lines[-1].split()
    assert plan("ppo-7b-8gpu", "--gpus", "8", "training.gradient_checkpointing=false", *changes) == 0


def test_wrong_input_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["ppo-7b-8gpu", "--gpus", "0"], "argument --gpus: 0: must be at least 1; see rlhf-ray plan --help"),
        (["ppo-7b-8gpu", "--gpu", "K80", "--gpus", "8"], "--gpu K80: no figures for it"),
        (["ppo-7b-8gpu", "--gpus", "8", "model.path=no/such"], "its shape is not known here"),
        (["ppo-7b-8gpu", "--gpus", "8", "trainin.zero_stage=1"], "trainin"),
        (["ppo-7b-8gpu", "--gpus", "8", "--stage", "sft"], "--stage sft: the configuration has online"),
        (["ppo-7b-8gpu", "--gpus", "8", "online.max_lag=1"], "placement.mode=colocated"),
    ):
        assert plan(*words) == 2
        assert message in capsys.readouterr().err


def test_planning_needs_no_torch() -> None:
    import subprocess

    code = (
        "import sys; from launch.cli import main; code = main(['plan', 'ppo-70b-128gpu', '--gpus', '128']); "
        "sys.exit(code or 10 * any(name in sys.modules for name in ('torch', 'ray', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_without_gpus_it_is_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("quickstart")
    roomy = make_plan(config, Machine(cpu(2, 32 * GIB), 1, 1))
    assert roomy.fits and [device.roles for device in roomy.devices] == [roomy.layout.roles]
    tight = make_plan(config, Machine(cpu(2, 12 * GIB), 1, 1))
    assert not tight.fits
    advice = advise(tight)
    assert advice is not None and advice.plan.fits
    again = make_plan(with_overrides(config, advice.changes), tight.machine)
    assert again.devices[0].peak == advice.plan.devices[0].peak


@pytest.mark.parametrize("stage", ["sft", "preferences", "reward", "online"])
def test_every_stage_has_a_plan(stage: str) -> None:
    config = load_config("quickstart")
    found = make_plan(config, Machine(cpu(2, 32 * GIB), 1, 1), stage=stage)  # type: ignore[arg-type]
    assert found.stage == stage and found.fits
    assert ("engine" in found.layout.roles) == (stage in ("preferences", "online"))


TRIO = [Wanted("policy", 4), Wanted("critic", 2), Wanted("engine", 2, width=2)]


def test_layouts() -> None:
    apart = lay_out(TRIO, PlacementSection(), 16, 8)
    assert [sorted(each.all_devices) for each in apart.placed] == [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9]]
    assert apart.spans_nodes("engine") and not apart.spans_nodes("policy")
    together = lay_out(TRIO, PlacementSection(mode="colocated"), 4, 8)
    assert together["engine"].devices == ((0, 1), (2, 3)) and together["critic"].devices == ((0,), (1,))
    assert together.missing == 0 and together.moves_out
    split = lay_out(TRIO, PlacementSection(mode="disaggregated"), 6, 8)
    assert not split.share("engine", "policy") and split.share("critic", "policy")
    assert split.missing == 2
    assert runs([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_frozen_models_in_parts_and_in_engines() -> None:
    config = load_config("ppo-7b-8gpu")

    def planned(*changes: str) -> Plan:
        return make_plan(with_overrides(config, changes), Machine(gpu("H100"), 8))

    def weights(plan: Plan, role: str) -> float:
        memory = next(each for each in plan.memories if each.role == role)
        return memory.terms[0].num_bytes

    whole, parts = planned(), planned("placement.reward.count=8")
    assert weights(parts, "reward") == pytest.approx(weights(whole, "reward") / 8)
    one, eight = (next(t for t in each.times if t.phase == "reward") for each in (whole, parts))
    assert eight.computing == pytest.approx(one.computing / 8)
    assert eight.communication > one.communication == 0
    served = planned(
        "placement.reference={backend: vllm, count: 4}",
        "placement.reward.backend=vllm",
        "placement.engine.count=4",
        "engine.tensor_parallel_size=2",
    )
    assert served.cast.reference is not None
    assert weights(served, "reference") == served.cast.reference.parameters, "bfloat16 on two devices"
    assert weights(served, "reward") == served.cast.rewards[0].parameters
    assert served.layout["reference"].devices == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert len(served.layout["reward"].devices[0]) == 2


def test_simulated_figures_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    config = with_overrides(load_config("grpo-7b-32gpu"), ["online.prompts_per_step=32"])
    planned = make_plan(config, Machine(gpu("H100"), 32), Assumed(answer=300))
    found = simulate_all(fleet_of(planned), SCHEDULES[:3], steps=2)
    assert [each.outcome.lag_max for each in found] == [0, 1, 1]
    show_simulated(planned, found, Console(width=140))
    said = capsys.readouterr().out
    assert "simulated speed-up" in said and "all of this is simulated" in said
    assert "published step times within 15%" in said and "NOT VALIDATED" in said
