"""`rlhf-ray check`: every mistake of a configuration, or what a run of it would do."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from launch.commands.shared import AddCommand, add_config, load
from launch.exit_codes import DONE

if TYPE_CHECKING:
    from rlhf_ray.config.schema import DatasetSection, RunConfig


def add(command: AddCommand) -> None:
    add_config(command("check", _check, "Say every mistake of a configuration; nothing is started."))


def _check(arguments: argparse.Namespace) -> int:
    print("\n".join(_described(load(arguments))))
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
