"""What goes with a job: its files, its command, and environment variables without their values on display."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from launch.submission import entrypoint, named_files, package, secrets
from launch.submission.client import explained
from launch.submission.entrypoint import persist
from launch.submission.job import Source, prepared, send
from rlhf_ray.config.checks import load_checked
from rlhf_ray.errors import ConfigError, RlhfRayError, UserError
from tests.tiny import tiny_model_folder

CONFIG = """\
output_dir: runs/x
model: {path: lm}
online:
  num_steps: 3
  max_prompt_length: 64
  critic_init: policy
  dataset: {path: ../data/prompts.jsonl}
  rewards:
    - {type: function, name: mine, function: "sent_rewards:score"}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person's folder, with data outside of it."""
    folder = tmp_path / "here"
    tiny_model_folder(folder / "lm")
    (folder / "sent_rewards.py").write_text(
        "def score(prompts, completions):\n    return [0.0] * len(prompts)\n"
    )
    (folder / "my.yaml").write_text(CONFIG)
    (folder / "runs" / "old").mkdir(parents=True)
    (folder / "runs" / "old" / "big").write_text("x")
    (folder / ".venv").mkdir()
    (folder / ".venv" / "lib.py").write_text("x")
    (folder / ".env").write_text("TOKEN=x")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prompts.jsonl").write_text('{"prompt": "How do I boil an egg?"}\n' * 5)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    return folder


def packaged(source: Source) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The package's files, and the words of the driver's command."""
    config = load_checked(source.config, source.overrides, source.shared)
    with prepared(source, config) as job, zipfile.ZipFile(job.package) as archive:
        return {name: archive.read(name) for name in archive.namelist()}, job.arguments


def test_the_package_has_code_configuration_and_data(here: Path) -> None:
    (here / "lm" / "notes").mkdir()
    (here / "lm" / "notes" / "draft.txt").write_text("x")
    files, words = packaged(Source("my.yaml", ("online.num_steps=2",), here, excludes=("lm/notes",)))
    assert {name for name in files if not name.startswith("lm/")} == {
        "my.yaml",
        "sent_rewards.py",
        ".rlhf-ray/my.yaml",
        ".rlhf-ray/data/1/prompts.jsonl",
    }
    assert "lm/model.safetensors" in files
    assert "lm/notes/draft.txt" in files, "the model's folder is sent whole, since the run reads it"
    assert files[".rlhf-ray/my.yaml"] == CONFIG.encode()
    assert files[".rlhf-ray/data/1/prompts.jsonl"] == Path("../data/prompts.jsonl").read_bytes()
    assert words == (
        "train",
        ".rlhf-ray/my.yaml",
        "online.num_steps=2",
        "online.dataset.path=.rlhf-ray/data/1/prompts.jsonl",
        f"output_dir={here}/runs/x",
        "cluster.address=auto",
    )


def test_the_job_reads_the_same_configuration(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacked elsewhere, every file that it names is there."""
    files, words = packaged(Source("my.yaml", (), here))
    there = here.parent / "there"
    for name, content in files.items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(content)
    (here.parent / "data" / "prompts.jsonl").unlink()
    monkeypatch.chdir(there)
    config = load_checked(words[1], words[2:])
    assert config.cluster.address == "auto"
    assert config.output_dir == here / "runs" / "x"


def test_a_head_without_an_agent_is_explained() -> None:
    pattern = r"http://head:8265.*No available agent.*--dashboard-agent-listen-port"
    with pytest.raises(UserError, match=pattern), explained("http://head:8265"):
        raise RuntimeError("Request failed with status code 500: No available agent to submit job")


def test_equal_packages_are_equal_bytes(here: Path) -> None:
    contents = []
    for _ in range(2):
        with prepared(Source("my.yaml", (), here), load_checked("my.yaml")) as job:
            contents.append(job.package.read_bytes())
        os.utime(here / "sent_rewards.py")
    assert contents[0] == contents[1]


def test_a_packaged_configuration_goes_along(here: Path) -> None:
    files, words = packaged(Source("quickstart", (), here))
    assert words[1] == ".rlhf-ray/quickstart.yaml"
    assert b"pipeline: [sft, preferences, reward, online]" in files[words[1]]


def test_in_a_repository_git_decides(here: Path) -> None:
    subprocess.run(["git", "init", "-q"], check=True)
    (here / ".gitignore").write_text("ignored.py\nlm/\n")
    (here / "ignored.py").write_text("x")
    files, _ = packaged(Source("my.yaml", (), here))
    assert "ignored.py" not in files
    assert "sent_rewards.py" in files
    assert "lm/model.safetensors" in files, "ignored, but the run reads it"


def test_shared_folders_are_not_sent(here: Path) -> None:
    data = here.parent / "data"
    files, words = packaged(Source("my.yaml", (), here, shared=(data,)))
    assert not [name for name in files if name.startswith(".rlhf-ray/data")]
    assert f"online.dataset.path={data}/prompts.jsonl" in words


def test_what_lies_on_shared_storage_alone_is_not_judged(here: Path) -> None:
    source = Source(
        "my.yaml",
        ("model.path=/nowhere/models/lm", "output_dir=/nowhere/runs"),
        here,
        shared=(Path("/nowhere"),),
    )
    _, words = packaged(source)
    assert words[-2] == "output_dir=/nowhere/runs"
    with pytest.raises(ConfigError, match=r"model\.path=/nowhere/models/lm: no such folder"):
        load_checked(source.config, source.overrides)


def test_large_files_are_refused_by_name(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named_files, "FILE_LIMIT", 100)
    with pytest.raises(ConfigError) as caught:
        packaged(Source("my.yaml", (), here))
    model, data = caught.value.mistakes
    assert model.startswith("model.path=lm: has 0 MiB, and at most 0 MiB go with a job; put it on storage")
    assert data.startswith("online.dataset.path=../data/prompts.jsonl: ")
    assert "--shared" in data and "hub" in data


def test_large_folders_are_refused_with_what_makes_them_large(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "PACKAGE_LIMIT", 2000)
    (here / "video.bin").write_bytes(bytes(10_000_000))
    with pytest.raises(UserError, match=r"the largest files are video\.bin \(10 MiB\), .*--exclude"):
        packaged(Source("my.yaml", (), here))


def test_a_wheel_brings_the_code(here: Path) -> None:
    wheel = here.parent / "rlhf_ray-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("launch/__init__.py", "")
        archive.writestr("rlhf_ray-1.dist-info/entry_points.txt", "x")
    files, _ = packaged(Source("my.yaml", (), None, wheel=wheel))
    assert {"launch/__init__.py", "rlhf_ray-1.dist-info/entry_points.txt", ".rlhf-ray/my.yaml"} <= set(files)
    assert "sent_rewards.py" not in files
    with pytest.raises(UserError, match=r"must be a wheel without compiled code"):
        packaged(Source("my.yaml", (), None, wheel=here / "x-1-cp311-cp311-linux_x86_64.whl"))


def test_secrets_in_the_configuration_are_refused(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"^logging\.wandb\.api_key: would lie in .*--env NAME$"):
        packaged(Source("my.yaml", ("logging.wandb.api_key=hidden",), here))


class Sent:
    """Keeps what it is asked to submit."""

    def submit_job(self, **options: object) -> str:
        self.options = options
        modules = options["runtime_env"].get("py_modules", [])  # type: ignore[attr-defined]
        self.sealed = [json.loads((Path(m) / "environment.json").read_text()) for m in modules]
        return "raysubmit_1"


def test_secrets_travel_apart(here: Path) -> None:
    server = Sent()
    with prepared(Source("my.yaml", (), here, max_retries=2), load_checked("my.yaml")) as job:
        send(server, job, {"HF_TOKEN": "hidden"})  # type: ignore[arg-type]
    assert server.sealed == [{"HF_TOKEN": "hidden"}]
    assert "hidden" not in json.dumps(server.options)
    command = str(server.options["entrypoint"])
    assert command.startswith(
        "exec python -m launch.submission.entrypoint --environment rlhf_ray_environment_"
    )
    assert " --max-retries 2 -- train .rlhf-ray/my.yaml " in command


def test_variables_are_chosen_by_name() -> None:
    assert secrets.chosen(["A", "B=x=y"], {"A": "1", "C": "2"}) == {"A": "1", "B": "x=y"}
    with pytest.raises(UserError, match="--env D: is not set here"):
        secrets.chosen(["D"], {})
    with pytest.raises(UserError) as caught:
        secrets.chosen(["not a name=hidden"], {})
    assert "hidden" not in str(caught.value)


def test_sealed_variables_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sealed = secrets.seal({"HF_TOKEN": "hidden", "OTHER": "1"}, tmp_path)
    file = sealed / "environment.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    inherited = {
        "py_modules": [f"gcs://{tmp_path.name}.zip", "gcs://theirs.zip"],
        "working_dir": "gcs://a.zip",
    }
    environment = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": inherited, "metadata": {}})}
    secrets.unseal(sealed.name, environment)
    assert environment["HF_TOKEN"] == "hidden"
    assert not file.exists()
    assert json.loads(environment["RAY_JOB_CONFIG_JSON_ENV_VAR"])["runtime_env"] == {
        "py_modules": ["gcs://theirs.zip"],
        "working_dir": "gcs://a.zip",
    }, "the other nodes do not get the file"
    monkeypatch.setattr(os, "environ", environment)
    assert secrets.passed_on() == {"HF_TOKEN": "hidden", "OTHER": "1"}
    with pytest.raises(RlhfRayError, match="did not arrive"):
        secrets.unseal(sealed.name, environment)


@pytest.mark.parametrize(
    ("codes", "retries", "result", "started"),
    [
        ([0], 2, 0, 1),
        ([2], 2, 2, 1),
        ([130], 2, 130, 1),
        ([1, -9, 0], 2, 0, 3),
        ([1, 1], 1, 1, 2),
        ([-9], 0, 137, 1),
    ],
)
def test_a_driver_that_dies_goes_on(codes: list[int], retries: int, result: int, started: int) -> None:
    commands = []

    def start(command: Sequence[str], environment: Mapping[str, str]) -> int:
        commands.append(list(command))
        return codes[len(commands) - 1]

    assert persist(["train", "x"], {}, retries, lambda: False, start) == result
    assert commands == [["train", "x"], *[["train", "x", "resume=auto"]] * (started - 1)]


def test_a_stopped_job_is_not_started_again() -> None:
    stops = [False, True]
    code = persist(["train", "x"], {}, 5, lambda: stops.pop(0), lambda command, environment: 1)
    assert (code, stops) == (1, [])


def test_the_command_of_a_job_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(entrypoint, "run", lambda command, environment: asked.append(command) or 0)
    monkeypatch.setattr(entrypoint.signal, "signal", lambda number, handler: None)
    assert entrypoint.main(["--max-retries", "1", "--", "train", "x.yaml", "a.b=-1"]) == 0
    assert asked == [["train", "x.yaml", "a.b=-1"]]
