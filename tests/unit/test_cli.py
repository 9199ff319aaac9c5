"""The command line: exit codes, messages, and that nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import launch
from launch.cli import main, parse
from rlhf_ray import __version__
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.errors import DataError, Interrupted, UserError, WorkerError
from tests.tiny import tiny_model_folder

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "ray", "transformers", "pydantic", "numpy", "vllm", "deepspeed", "datasets", "yaml", "rich"}

CONFIG = """\
output_dir: runs/x
model: {path: lm}
online:
  num_steps: 3
  prompts_per_step: 4
  num_generations: 2
  num_ppo_epochs: 2
  num_mini_batches: 4
  max_prompt_length: 64
  critic_init: policy
  dataset: {path: prompts.jsonl}
  rewards:
    - {type: function, name: gold, function: "rlhf_ray.rewards.gold:friendliness"}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    tiny_model_folder(tmp_path / "lm")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "How do I boil an egg?"}\n' * 5)
    (tmp_path / "my.yaml").write_text(CONFIG)
    return "my.yaml"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """What `train` was asked to run, instead of running it."""
    asked: list[RunConfig] = []
    monkeypatch.setitem(vars(launch), "run_checked", asked.append)
    return asked


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(config: RunConfig) -> None:
        raise error

    monkeypatch.setitem(vars(launch), "run_checked", run)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"], ["trian"], []])
def test_nothing_heavy_is_imported_for_an_answer_about_the_command_line(words: list[str]) -> None:
    code = (
        "import sys; from launch.cli import main; main(sys.argv[1:]); "
        f"print(sorted({{m.partition('.')[0] for m in sys.modules}} & {HEAVY}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_lists_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert listed == ["train", "check", "plan", "doctor", "generate", "report", "bench"]
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rlhf-ray {__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["trian", "x"],
            "no command trian (there are train, check, plan, doctor, generate, report, bench); did you mean train?",
        ),
        ([], "which command?; see rlhf-ray --help"),
        (["train"], "the following arguments are required: CONFIG; see rlhf-ray train --help"),
        (["train", "x", "--resum"], "train has no option --resum; did you mean --resume?"),
        (["check", "x", "--frobnicate=1", "a=1"], "check has no option --frobnicate"),
        (["report", "x", "y"], "report: what is y for? see rlhf-ray report --help"),
        (
            ["generate", "x", "--prompt", "hi", "--temperature", "-1"],
            "argument --temperature: -1: must be at least 0; see rlhf-ray generate --help",
        ),
        (
            ["generate", "x", "--prompt", "hi", "--max-completion-length", "0"],
            "argument --max-completion-length: 0: must be at least 1; see rlhf-ray generate --help",
        ),
        (["generate", "./none", "--prompt", "hi"], "model=./none: no such folder"),
        (["train", "my.yaml", "online.num_steps=0"],
         "override online.num_steps=0: must be a whole number greater than 0"),
        (["check", "my.yaml", "nonsense"], "override nonsense: write it as key.path=value"),
    ],
)  # fmt: skip
def test_wrong_input(config: str, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err == f"rlhf-ray: {message}\n"


def test_several_mistakes_are_a_list(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("check", "train"):
        assert main([command, config, "sed=1", "online.dataset.path=promts.jsonl"]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err == (
            "rlhf-ray: 2 mistakes\n"
            "  - override sed=1: unknown key; did you mean seed?\n"
            "  - override online.dataset.path=promts.jsonl: no such file; did you mean prompts.jsonl?\n"
        )


def test_debug_shows_the_traceback(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--debug", "check", config, "sed=1"], ["check", config, "--debug", "sed=1"]):
        assert main(words) == 2
        assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_check_says_what_would_run(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["sft.dataset.path=embedded:demonstrations", "pipeline=[sft, online]", "sft.max_steps=9"]
    assert main(["check", config, *overrides]) == 0
    lines = capsys.readouterr().out.splitlines()
    demonstrations = (ROOT / "rlhf_ray/data/embedded/demonstrations.jsonl").read_text().splitlines()
    count = sum(json.loads(line)["split"] == "train" for line in demonstrations)
    assert lines == [
        "OK: 2 stages: sft, online",
        f"  sft         model lm; embedded:demonstrations ({count} rows); "
        "1 epoch in batches of 16, at most 9 steps",
        "  online      model that sft makes; prompts.jsonl (5 rows); "
        "3 steps of 8 samples and 8 optimizer steps; rewards gold",
        "  output_dir  runs/x",
    ]
    assert not Path("runs").exists()


def test_train_takes_overrides_and_options_in_any_order(config: str, runs: list[RunConfig]) -> None:
    assert (
        main(["train", config, "online.num_steps=7", "--resume", "seed=3", "--debug", "online.lam=0.5"]) == 0
    )
    (run,) = runs
    assert run.online is not None
    assert (run.online.num_steps, run.seed, run.online.lam, run.resume) == (7, 3, 0.5, "auto")
    assert main(["train", "--resume", config]) == 0
    assert main(["train", config]) == 0
    assert [run.resume for run in runs] == ["auto", "auto", "never"]


def test_a_failed_run_leaves_its_traceback_in_the_log(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Path("runs/x/logs/driver.log")
    log.parent.mkdir(parents=True)
    log.write_text("earlier\n")
    failing(monkeypatch, WorkerError("critic 0 did not answer `values` within 60 s"))
    assert main(["train", config]) == 1
    printed = capsys.readouterr().err
    assert printed == (
        "rlhf-ray: WorkerError: critic 0 did not answer `values` within 60 s\n"
        "  the whole traceback: runs/x/logs/driver.log\n"
    )
    written = log.read_text()
    assert written.startswith("earlier\nTraceback (most recent call last):\n")
    assert written.endswith("WorkerError: critic 0 did not answer `values` within 60 s\n")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("dataset.path=x: has no rows"), 2, "dataset.path=x: has no rows"),
        (Interrupted("saved step 3; go on with --resume"), 130, "saved step 3; go on with --resume"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError(), 1, "ZeroDivisionError\n  the whole traceback: runs/x/logs/driver.log"),
    ],
)  # fmt: skip
def test_exit_codes(
    config: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    failing(monkeypatch, error)
    assert main(["train", config]) == code
    assert capsys.readouterr().err == f"rlhf-ray: {message}\n"


def test_reports_of_no_run_are_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_generate_greedy_equals_a_loop_over_forward_passes(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = ["generate", "lm", "--prompt", "How do I boil an egg?", "--max-completion-length", "12"]
    assert main([*words, "--temperature", "0"]) == 0
    printed = capsys.readouterr().out

    tokenizer, model = AutoTokenizer.from_pretrained("lm"), AutoModelForCausalLM.from_pretrained("lm")
    text = "<|im_start|>user\nHow do I boil an egg?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    while len(ids) < start + 12 and tokenizer.eos_token_id not in ids[start:]:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert printed == str(tokenizer.decode(ids[start:], skip_special_tokens=True)).strip() + "\n"


def test_generate_depends_on_the_seed_alone(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for seed in (1, 1, 2):
        assert main(["generate", "lm", "--prompt", "hi", "--temperature", "1", "--seed", str(seed)]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_bench_runs_a_module_with_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import benchmarks

    (tmp_path / "speedy.py").write_text(
        '"""How fast it is.\n\nMore."""\ndef main(argv):\n    print(argv)\n    return 0\n'
    )
    (tmp_path / "helper.py").write_text("raise SystemExit('a helper is not imported')\n")
    monkeypatch.setattr(benchmarks, "__path__", [str(tmp_path)])
    assert main(["bench", "speedy", "--json", "out.json", "--steps", "3"]) == 0
    assert capsys.readouterr().out == "['--json', 'out.json', '--steps', '3']\n"
    assert main(["bench", "speedy", "--help"]) == 0
    assert capsys.readouterr().out == "['--help']\n", "its own help"
    assert main(["bench", "speedy", "key.path=3", "--debug", "-h", "more"]) == 0
    assert capsys.readouterr().out == "['key.path=3', '-h', 'more']\n", "what is not ours, in its order"
    assert main(["bench"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  speedy  How fast it is."
    assert main(["bench", "--help"]) == 0
    assert "[NAME]" in capsys.readouterr().out
    assert main(["bench", "speed"]) == 2
    assert (
        capsys.readouterr().err == "rlhf-ray: no benchmark speed (there are speedy); did you mean speedy?\n"
    )


def documented_commands() -> list[str]:
    readme = ROOT / "README.md"
    fences = re.findall(r"^```\w*\n(.*?)^```", readme.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "\n".join(fences).replace("\\\n", " ").splitlines()
    starts = ("rlhf-ray ", ".venv/bin/rlhf-ray ")
    return [line.partition(" ")[2] for line in map(str.strip, lines) if line.startswith(starts)]


def test_the_readme_documents_the_commands() -> None:
    """Otherwise the next test would have nothing to test."""
    assert {"train", "check", "report", "generate", "doctor"} <= {c.split()[0] for c in documented_commands()}


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_parse(command: str) -> None:
    words = shlex.split(command, comments=True)
    try:
        arguments = parse(words)
    except UserError as error:
        pytest.fail(f"rlhf-ray {command}: {error}")
    overrides = getattr(arguments, "overrides", [])
    assert all("=" in override for override in overrides)
