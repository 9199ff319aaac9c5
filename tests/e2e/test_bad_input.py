"""What a person gets wrong: exit code 2, a message that names it, no traceback, and nothing lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from launch import run
from launch.cli import main
from rlhf_ray import load_config
from rlhf_ray.errors import ConfigError
from rlhf_ray.reporting.run_folder import RunFolder
from tests.command_line import ROOT, CommandLine
from tests.e2e.runs import contents

pytestmark = [pytest.mark.actors, pytest.mark.usefixtures("ray_cluster")]

ROWS = '{"prompt": "How do I boil an egg?"}\n{"prompt": "How do I bake bread?"}\n'


@pytest.fixture(autouse=True)
def in_the_workplace(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def refusal(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """What is said, on one run that is refused."""
    capfd.readouterr()
    assert main(["train", "online.yaml", *words]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("rlhf-ray: ")
    assert "Traceback" not in err
    return err.removeprefix("rlhf-ray: ")


@pytest.fixture
def here(workplace: Path, tmp_path: Path) -> Path:
    """Files that are wrong, each in its way."""
    (tmp_path / "columns.jsonl").write_text('{"question": "How?"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "How?"}\n{"prompt": \n')
    (tmp_path / "good.jsonl").write_text(ROWS)
    for name in ("no-tokenizer", "no-template"):
        shutil.copytree(workplace / "tiny", tmp_path / name)
    (tmp_path / "no-tokenizer" / "tokenizer.json").unlink()
    (tmp_path / "no-template" / "chat_template.jinja").unlink()
    return tmp_path


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "online.dataset.path={here}/nowhere.jsonl",
            ("online.dataset.path=", "nowhere.jsonl", "no such file"),
        ),
        ("online.dataset.path={here}/columns.jsonl", ("online.dataset", "question", "prompt")),
        ("online.dataset.path={here}/empty.jsonl", ("online.dataset", "empty.jsonl")),
        ("online.dataset.path={here}/broken.jsonl", ("online.dataset", "broken.jsonl", "line 2")),
        ("model.path={here}/no-tokenizer", ("model.path=", "has no tokenizer")),
        ("model.path={here}/no-template", ("model.path=", "no chat template", "chat_template")),
        ("model.path={here}", ("model.path=", "no config.json")),
        ("online.num_step=3", ("online.num_step", "did you mean num_steps?")),
        (
            "online.rewards.0.function=my_rewards:vowel",
            ("online.rewards.0.function=my_rewards:vowel", "vowel"),
        ),
    ],
)
def test_seen_before_anything_starts(
    override: str, said: tuple[str, ...], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    err = refusal(capfd, override.format(here=here), f"output_dir={here}/run")
    for words in said:
        assert words in err
    assert not (here / "run").exists()


def test_every_mistake_is_said_at_once(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    err = refusal(
        capfd,
        f"online.dataset.path={here}/empty.jsonl",
        f"model.path={here}/no-tokenizer",
        "online.num_step=3",
        f"output_dir={here}/run",
    )
    assert err.startswith("3 mistakes\n")
    for words in ("empty.jsonl", "no-tokenizer", "num_step"):
        assert words in err


def test_python_is_told_before_anything_starts(here: Path) -> None:
    config = load_config(
        "online.yaml", [f"online.dataset.path={here}/nowhere.jsonl", f"output_dir={here}/run"]
    )
    with pytest.raises(ConfigError, match=r"online\.dataset\.path=.*: no such file"):
        run(config, quiet=True)
    assert not (here / "run").exists()


def test_another_run_is_not_overwritten(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = here / "run"
    (run / "model").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"name": "online"}))
    (run / "model" / "model.safetensors").write_bytes(b"weights")
    before = contents(run)
    err = refusal(capfd, f"output_dir={run}")
    assert f"output_dir={run}" in err and "holds another run" in err and "resume=auto" in err
    assert contents(run) == before


def test_files_without_a_run_are_not_overwritten(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = here / "run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "model.safetensors").write_bytes(b"weights")
    before = contents(run)
    err = refusal(capfd, f"output_dir={run}")
    assert f"output_dir={run}" in err and "holds model" in err
    assert contents(run) == before


def test_too_many_cpus(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    err = refusal(capfd, "placement.policy.cpus=100", f"output_dir={here}/run")
    assert err.startswith("placement: asks for 1 x policy with 100 CPU, ")
    assert "The cluster has 2 CPU, 0 GPU, 16.0 GiB memory. Missing: " in err
    assert RunFolder(here / "run").read().status == "failed"
    assert not (here / "run" / "model").exists()


def test_prompts_that_are_all_too_long(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    err = refusal(
        capfd,
        f"online.dataset.path={here}/good.jsonl",
        "online.max_prompt_length=4",
        f"output_dir={here}/run",
    )
    assert "good.jsonl" in err and "max_prompt_length" in err


def test_no_cluster_answers(rlhf_ray: CommandLine, here: Path) -> None:
    """In a process of its own: this one is connected to a cluster."""
    finished = rlhf_ray.run(
        "train", "online.yaml", f"output_dir={here}/run", "cluster.address=127.0.0.1:9", timeout=120
    )
    assert finished.code == 2
    assert finished.err.startswith("rlhf-ray: cluster.address=127.0.0.1:9: no Ray cluster answers there")
    assert "Traceback" not in finished.err
    assert not (here / "run" / "run.json").exists()
