"""The command line: `rlhf-ray`, also `python -m launch`.

Exit codes: 0 done; 1 the run failed; 2 the input is wrong; 130 interrupted, after saving.

Nothing heavy is imported before a command is known: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, cast

from launch.interrupts import stopping_at_once
from rlhf_ray import __version__
from rlhf_ray.errors import ConfigError, Interrupted, UserError

if TYPE_CHECKING:
    from transformers import BatchEncoding

    from rlhf_ray.config.schema import DatasetSection, ModelSection, RunConfig

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130


class _RunFailed(Exception):
    """A run failed; its cause is the reason. `log` is where the traceback was written."""

    def __init__(self, log: Path) -> None:
        super().__init__(str(log))
        self.log = log


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: the words after the program's name; by default those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        arguments = parse(words)
        return int(arguments.handler(arguments))
    except SystemExit as finished:  # argparse has printed help or the version
        return int(finished.code or 0)
    except (KeyboardInterrupt, Interrupted) as interruption:
        _complain(str(interruption) or "interrupted", debug)
        return INTERRUPTED
    except UserError as error:
        mistakes = error.mistakes if isinstance(error, ConfigError) else (str(error),)
        _complain(_listed(mistakes), debug)
        return WRONG_INPUT
    except _RunFailed as failure:
        _complain(f"{_said(failure.__cause__)}\n  the whole traceback: {failure.log}", debug)
        return FAILED
    except Exception as error:
        _complain(f"{_said(error)}\n  --debug shows the traceback", debug)
        return FAILED


def _complain(text: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"rlhf-ray: {text}", file=sys.stderr)


def _listed(mistakes: Sequence[str]) -> str:
    if len(mistakes) == 1:
        return mistakes[0]
    return "\n".join([f"{len(mistakes)} mistakes", *(f"  - {mistake}" for mistake in mistakes)])


def _said(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command, with its `handler`; overrides and options may stand in any order.

    Raises:
        UserError: no such command or option.
    """
    parser, commands = _parsers()
    command = next((word for word in words if not word.startswith("-")), None)
    if command is not None and command not in commands:
        raise UserError(
            f"no command {command} (there are {', '.join(commands)}){_nearest(command, commands)}"
        )
    arguments, left = parser.parse_known_args(words)
    if command is None:
        parser.error("which command?")
    unknown = [word.partition("=")[0] for word in left if word.startswith("-")]
    if unknown:
        options = re.findall(r"--[\w-]+", commands[command].format_help())
        raise UserError(f"{command} has no option {unknown[0]}{_nearest(unknown[0], options)}")
    if command in ("train", "check"):
        arguments.overrides = [*arguments.overrides, *left]
    elif left:
        raise UserError(f"{command}: what is {' '.join(left)} for? see rlhf-ray {command} --help")
    return arguments


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser, and those of its commands by name."""
    parser = _Parser(prog="rlhf-ray", description="RLHF for language models on Ray.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"rlhf-ray {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    group = parser.add_subparsers(title="commands", metavar="COMMAND")
    commands: dict[str, _Parser] = {}

    def add(name: str, handler: Callable[[argparse.Namespace], int], about: str) -> _Parser:
        command: _Parser = group.add_parser(name, help=about, description=about, allow_abbrev=False)
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks"
        )
        command.set_defaults(handler=handler)
        commands[name] = command
        return command

    train = add("train", _train, "Run a stage, or a pipeline of stages.")
    _add_config(train)
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint: resume=auto")
    _add_config(add("check", _check, "Say every mistake of a configuration; nothing is started."))
    add("doctor", _doctor, "Say what this machine has, and what is missing.")
    generate = add("generate", _generate, "Ask a model one question.")
    generate.add_argument(
        "model", metavar="MODEL", help="a model folder, a .gguf file, or the embedded model"
    )
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-completion-length", type=_positive, default=128, metavar="TOKENS")
    generate.add_argument("--temperature", type=_temperature, default=0.7, help="0 takes the likeliest token")
    generate.add_argument("--seed", type=int, default=0)
    report = add("report", _report, "Show the closing table of a run again.")
    report.add_argument("run", metavar="RUN", type=Path, help="the run's output_dir")
    bench = add("bench", _bench, "Measure one of the README's claims; without a name, list them.")
    bench.add_argument("name", metavar="NAME", nargs="?")
    bench.add_argument(
        "words", metavar="OPTIONS", nargs=argparse.REMAINDER, help="of the benchmark; see NAME --help"
    )
    return parser, commands


def _add_config(command: _Parser) -> None:
    command.add_argument(
        "config", metavar="CONFIG", help="a YAML file, or the name of a packaged configuration"
    )
    command.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="changed values, such as online.num_steps=5",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number


def _temperature(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0")
    return number


def _load(arguments: argparse.Namespace, overrides: Sequence[str]) -> RunConfig:
    from rlhf_ray.config.checks import load_checked

    # Reward functions lie beside the configuration; an installed script does not look there by itself.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return load_checked(arguments.config, overrides)


def _train(arguments: argparse.Namespace) -> int:
    with stopping_at_once():
        config = _load(arguments, [*arguments.overrides, *(["resume=auto"] if arguments.resume else [])])
        return _run(config)


def _run(config: RunConfig) -> int:
    run = cast("Callable[[RunConfig], object]", importlib.import_module("launch").run_checked)
    try:
        run(config)
    except (UserError, Interrupted):
        raise
    except Exception as error:
        log = config.output_dir / "logs" / "driver.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            traceback.print_exception(error, file=file)
        raise _RunFailed(log) from error
    return DONE


def _check(arguments: argparse.Namespace) -> int:
    config = _load(arguments, arguments.overrides)
    print("\n".join(_described(config)))
    return DONE


def _described(config: RunConfig) -> list[str]:
    """What a run of this configuration would do, a line a stage.

    Raises:
        DataError: a row of a dataset cannot be read.
    """
    from rlhf_ray.config.schema import turn_names

    names = turn_names(config.stages)
    lines = [f"OK: {_many(len(names), 'stage')}: {', '.join(names)}"]
    width = max(11, *map(len, names)) + 1
    made = ""
    for name, stage in zip(names, config.stages, strict=True):
        section = getattr(config, stage)
        model = section.model.path if section.model else made or config.model.path
        parts = [f"model {model}"]
        if section.dataset is not None:
            parts.append(_counted(section.dataset, config.seed))
        elif stage in ("reward", "preference"):
            parts.append("pairs that preferences collects")
        lines.append(f"  {name:<{width}}{'; '.join([*parts, *_amount(config, stage)])}")
        if stage in ("sft", "constitution", "preference", "online"):
            made = f"that {name} makes"
    return [*lines, f"  {'output_dir':<{width}}{config.output_dir}"]


def _counted(dataset: DatasetSection, seed: int) -> str:
    from rlhf_ray.data.loading import first_rows, load_rows
    from rlhf_ray.data.reasoning_gym import DEFAULT_SIZE, PREFIX

    if dataset.path.startswith(PREFIX):  # some tasks take a second a question
        return f"{dataset.path} (at most {_many(dataset.limit or DEFAULT_SIZE, 'question')})"
    if first_rows(dataset, 1) is None:
        return f"{dataset.path} (on the hub, not counted)"
    return f"{dataset.path} ({_many(len(load_rows(dataset, seed)), 'row')})"


def _amount(config: RunConfig, stage: str) -> list[str]:
    """How much work a stage is."""
    online, preferences = config.online, config.preferences
    if stage == "online" and online is not None:
        updates = online.num_ppo_epochs * online.num_mini_batches
        return [
            f"{_many(online.num_steps, 'step')} of {_many(online.samples_per_step, 'sample')} and "
            f"{_many(updates, 'optimizer step')}",
            f"rewards {', '.join(online.reward_names)}",
        ]
    if stage == "preferences" and preferences is not None:
        asked = ", ".join(annotator.name for annotator in preferences.annotators)
        return [f"{preferences.num_generations} answers a prompt", f"annotators {asked}"]
    section = getattr(config, stage)
    limit = f", at most {section.max_steps} steps" if section.max_steps else ""
    parts = [f"{_many(section.num_epochs, 'epoch')} in batches of {section.batch_size}{limit}"]
    if stage == "constitution":
        parts.insert(0, f"{_many(section.num_rounds, 'revision')} an answer by {section.principles}")
    return parts


def _many(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _doctor(arguments: argparse.Namespace) -> int:
    from launch.doctor import run_doctor

    return int(run_doctor())


def _generate(arguments: argparse.Namespace) -> int:
    from rlhf_ray.config.model_checks import path_mistakes
    from rlhf_ray.config.schema import ModelSection
    from rlhf_ray.errors import ModelError

    mistakes = list(path_mistakes(arguments.model, "language"))
    if mistakes:
        raise ModelError(f"model={arguments.model}: {'; '.join(mistakes)}")
    print(_answer(ModelSection(path=arguments.model), arguments))
    return DONE


def _answer(section: ModelSection, arguments: argparse.Namespace) -> str:
    import torch
    from transformers import GenerationConfig
    from transformers.utils import logging

    from rlhf_ray.models.loading import eos_token_ids, load_policy_model, load_tokenizer

    logging.disable_progress_bar()
    tokenizer = load_tokenizer(section)
    model = load_policy_model(section)
    conversation = [{"role": "user", "content": arguments.prompt}]
    inputs = cast(
        "BatchEncoding",
        tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ),
    )
    sampling = {"temperature": arguments.temperature, "top_k": 0} if arguments.temperature else {}
    ends = list(eos_token_ids(section, tokenizer))
    torch.manual_seed(arguments.seed)
    # transformers types `generate` as a tensor, since modules may have attributes of any kind.
    generate = cast("Callable[..., torch.Tensor]", model.generate)
    output = generate(
        **inputs,
        use_cache=True,
        generation_config=GenerationConfig(
            max_new_tokens=arguments.max_completion_length,
            do_sample=bool(sampling),
            eos_token_id=ends,
            pad_token_id=ends[0],
            **sampling,
        ),
    )
    prompt_length = inputs["input_ids"].shape[1]
    return str(tokenizer.decode(output[0, prompt_length:], skip_special_tokens=True)).strip()


def _report(arguments: argparse.Namespace) -> int:
    from rlhf_ray.reporting.summary import render_run

    render_run(arguments.run)
    return DONE


def _bench(arguments: argparse.Namespace) -> int:
    from launch.bench import run_benchmark

    # --debug is ours wherever it stands; the rest is the benchmark's.
    return run_benchmark(arguments.name, [word for word in arguments.words if word != "--debug"])


if __name__ == "__main__":
    sys.exit(main())
