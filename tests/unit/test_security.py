"""Nothing from outside runs unless a person asks for it, and no secret is written down."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import launch
from launch.cli import main
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.config.model_checks import model_mistakes
from rlhf_ray.config.schema import (
    DatasetSection,
    EngineSection,
    LoggingSection,
    ModelSection,
    TrainingSection,
)
from rlhf_ray.data.loading import load_rows
from rlhf_ray.engines.hf_generator import HFGenerator
from rlhf_ray.errors import CheckpointError, DataError, ModelError, RewardError, WorkerError
from rlhf_ray.models.loading import load_policy_model, load_scalar_model, load_tokenizer, max_model_length
from rlhf_ray.reporting.metrics_log import MetricsLog
from rlhf_ray.reporting.run_folder import RunFolder, RunRecord
from rlhf_ray.types import Ragged, SFTBatch
from rlhf_ray.workers.policy import PolicyWorker
from tests.command_line import ROOT
from tests.ranks import worker_spec
from tests.reward_servers import answering, http_section, running
from tests.tiny import tiny_model_folder
from tests.unit.test_reward_http import ask

CANARY = "canary-hunter2-hunter2"


class Trap:
    """A pickle that makes a folder where it is read."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.sprung),)


@pytest.fixture
def sprung(tmp_path: Path) -> Path:
    """What a trap makes."""
    return tmp_path / "sprung"


def test_the_trap_works(sprung: Path) -> None:
    with pytest.raises(TypeError):
        torch.nn.Module().load_state_dict(pickle.loads(pickle.dumps(Trap(sprung))))
    assert sprung.exists()


# Models and data from outside


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_weights_as_pickles_are_refused(tmp_path: Path, sprung: Path, name: str) -> None:
    folder = tiny_model_folder(tmp_path / "lm")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    section = ModelSection(path=str(folder))
    ((key, said),) = model_mistakes(section, "language")
    assert key == "path" and f"has its weights as {name}, a pickle" in said and "save_pretrained" in said
    for load in (load_policy_model, lambda found: load_scalar_model(found, seed=0)):
        with pytest.raises(ModelError, match=r"cannot be loaded"):
            load(section)
    with pytest.raises(OSError):
        HFGenerator(str(folder), EngineSection(dtype="float32"), max_model_len=64, threads=1)
    assert not sprung.exists()


def test_a_pickle_beside_safetensors_is_not_read(tmp_path: Path, sprung: Path) -> None:
    folder = tiny_model_folder(tmp_path / "lm")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(sprung)))
    assert not list(model_mistakes(ModelSection(path=str(folder)), "language"))
    load_policy_model(ModelSection(path=str(folder)))
    assert not sprung.exists()


@pytest.mark.parametrize("name", ["train.pkl", "train.pickle", "train.pt", "train.npy"])
def test_datasets_as_pickles_are_refused(tmp_path: Path, sprung: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / name
    path.write_bytes(pickle.dumps(Trap(sprung)))
    for which in (path, path.parent):
        with pytest.raises(DataError):
            load_rows(DatasetSection(path=str(which)), seed=0)
    assert not sprung.exists()


def test_code_of_a_model_is_not_run_unless_asked(tmp_path: Path, sprung: Path) -> None:
    folder = tiny_model_folder(tmp_path / "lm")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.Foreign"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "foreign.py").write_text(
        f"import os\nos.mkdir({str(sprung)!r})\n"
        "from transformers import LlamaConfig\nclass Foreign(LlamaConfig):\n    model_type = 'foreign'\n"
    )
    section = ModelSection(path=str(folder))
    assert section.trust_remote_code is False
    for load in (max_model_length, load_policy_model):
        with pytest.raises(ModelError, match=r"code of its own.*set model\.trust_remote_code=true"):
            load(section)
    load_tokenizer(section)
    assert not sprung.exists()
    assert max_model_length(section.model_copy(update={"trust_remote_code": True})) == 512
    assert sprung.exists(), "asked for, it is run"


# Our own checkpoints


def batch() -> SFTBatch:
    tokens = Ragged.from_rows([np.arange(3, 20)] * 2, np.int32)
    return SFTBatch(tokens, tokens.with_values(np.arange(len(tokens.values)) % 3 > 0))


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_checkpoint_that_somebody_changed_runs_nothing(
    tmp_path: Path, sprung: Path, zero_stage: int
) -> None:
    model = ModelSection(path=str(tiny_model_folder(tmp_path / "lm")))
    training = TrainingSection(precision="float32", zero_stage=zero_stage)
    saving = PolicyWorker(model, worker_spec(training))
    saving.train_sft(batch())
    saving.save_state(tmp_path / "good")
    loading = PolicyWorker(model, worker_spec(training))
    loading.load_state(tmp_path / "good")
    files = sorted(path.relative_to(tmp_path / "good") for path in (tmp_path / "good").rglob("*.pt"))
    assert len(files) == (2 if zero_stage == 0 else 3)
    for number, name in enumerate(files):
        bad = tmp_path / f"bad-{number}"
        shutil.copytree(tmp_path / "good", bad)
        torch.save({"module": Trap(sprung), "torch": Trap(sprung)}, bad / name)
        with pytest.raises(CheckpointError, match="damaged"):
            loading.load_state(bad)
    assert not sprung.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


# Servers


def test_the_reward_server_binds_to_loopback_and_wants_a_token(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "rlhf_ray.rewards.server", "tests.fakes:num_vowels", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RLHF_RAY_REWARD_TOKEN", None)
    without = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert without.returncode == 2 and "RLHF_RAY_REWARD_TOKEN is not set" in without.stderr
    environment["RLHF_RAY_REWARD_TOKEN"] = CANARY
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        said = server.stdout.readline()
        listening = [
            c.laddr.ip for c in psutil.Process(server.pid).net_connections("tcp") if c.status == "LISTEN"
        ]
        command = " ".join(psutil.Process(server.pid).cmdline())
        server.kill()
    assert "http://127.0.0.1:" in said
    assert listening == ["127.0.0.1"]
    assert CANARY not in said + command


# Secrets


SECRETS = {
    "output_dir": "run",
    "model": {"path": "lm"},
    "online": {
        "num_steps": 1,
        "dataset": {"path": "embedded:guess"},
        "algorithm": "grpo",
        "num_generations": 2,
        "max_prompt_length": 64,
        "max_completion_length": 8,
        "environment": {
            "class_path": "my_game:Game",
            "max_episode_length": 64,
            "options": {
                "api_key": CANARY,
                "deep": [{"hub_token": [CANARY]}],
                "SECRET_ACCESS_KEY": CANARY,
            },
        },
    },
    "logging": {"wandb": {"api_key": CANARY, "mode": "offline"}},
}


GAME = """\
class Game:
    def __init__(self, **options):
        pass

    def reset(self, messages, columns, seed):
        pass

    def step(self, answer):
        pass
"""


def everything_below(folder: Path) -> str:
    return "\n".join(
        f"{path}\n{path.read_bytes().decode('latin-1')}" for path in folder.rglob("*") if path.is_file()
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_model_folder(tmp_path / "lm")
    (tmp_path / "my_game.py").write_text(GAME)
    return tmp_path


def test_no_secret_in_what_a_run_writes(here: Path) -> None:
    """run.json, and all that wandb makes of the configuration and the key."""
    config = load_config(SECRETS)
    folder = RunFolder(here / "run")
    folder.begin(RunRecord(name="online", config=dump_config(config)), resume=False)
    assert config.logging.wandb is not None
    with MetricsLog(folder, "online", config.logging, config=dump_config(config)) as log:
        log.log(0, {"loss": 1.0})
    written = everything_below(here / "run")
    assert "offline-run" in written and '"api_key": "***"' in written
    assert CANARY not in written
    assert CANARY not in repr(config) + str(config) + repr(LoggingSection())


@pytest.mark.parametrize(
    "wrong",
    [
        "logging.wandb.api_kay={}",
        "logging.wandb.api_key=[{}]",
        "logging.wandb.api_key.x={}",
        "logging={{wandb: {{api_key: {}, projct: x}}}}",
        "logging.wandb={{secret: {}}}",
        "api_key={}",
        "online.environment.options=[{{password: {}}}]",
        "online.rewards=[{{type: http, name: h, url: 'http://u:{}@h/'}}]",
        "online.rewards=[{{type: http, name: h, url: 'http://h/', token: {}}}]",
    ],
)
def test_no_secret_in_a_message(here: Path, capfd: pytest.CaptureFixture[str], wrong: str) -> None:
    Path("run.yaml").write_text(json.dumps(SECRETS))
    assert main(["check", "run.yaml", wrong.format(CANARY)]) == 2
    out, err = capfd.readouterr()
    assert CANARY not in out + err


def test_no_secret_in_a_traceback(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: object) -> None:
        key = config.logging.wandb.api_key.get_secret_value()  # type: ignore[attr-defined]
        assert key == CANARY
        raise WorkerError(f"policy 0 failed with {config!r}")

    monkeypatch.setitem(vars(launch), "run_checked", fail)
    Path("run.yaml").write_text(json.dumps(SECRETS))
    assert main(["--debug", "train", "run.yaml"]) == 1
    out, err = capfd.readouterr()
    log = (here / "run" / "logs" / "driver.log").read_text()
    assert "Traceback" in log and "policy 0 failed with RunConfig(output_dir=" in err
    assert "'api_key': '***'" in err
    assert CANARY not in log + out + err


def test_a_server_that_repeats_the_token(here: Path) -> None:
    from aiohttp import web

    async def repeat(request: web.Request) -> web.Response:
        return web.Response(status=500, text=f"who is {request.headers['Authorization']}?")

    with running(answering(repeat)) as url, pytest.raises(RewardError) as raised:
        ask(http_section(url, on_error="raise"), "a", token=CANARY)
    assert "answered 500: who is Bearer ***?" in str(raised.value)
