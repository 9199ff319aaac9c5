"""Every check that needs no cluster and no model in memory: files, models, functions, and what fits to what.

The checks look at sections, each validated by itself, so that a missing dataset is reported beside a misspelt
key in another section, or in the same one.
"""

from __future__ import annotations

import json
import netrc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, cast

from pydantic import ValidationError

from rlhf_ray.config import outline
from rlhf_ray.config.document import Document, KeyPath, Raw, plain
from rlhf_ray.config.loading import parse_document, read_document
from rlhf_ray.config.model_checks import Kind, max_positions, model_mistakes, path_mistakes
from rlhf_ray.config.schema import (
    STAGES,
    DatasetSection,
    EngineSection,
    EnvironmentSection,
    FileAnnotator,
    FunctionReward,
    LoggingSection,
    ModelReward,
    ModelSection,
    OnlineSection,
    PlacementSection,
    PreferencesSection,
    RewardSection,
    RunConfig,
    Section,
    SFTSection,
    SimulatedAnnotator,
    StageName,
)
from rlhf_ray.errors import ConfigError
from rlhf_ray.reporting.run_folder import RunFolder

Finding = tuple[KeyPath, str]
S = TypeVar("S", bound=Section)


def load_checked(source: str | Path | Mapping[str, object], overrides: Sequence[str] = ()) -> RunConfig:
    """`load_config`, with the checks of this module run whether or not the schema is content.

    Raises:
        ConfigError: every mistake, one sentence each.
    """
    document = read_document(source, overrides)
    config = parse_document(document)
    _check(document)
    if config is None or document.mistakes:
        raise ConfigError(*document.mistakes)
    return config


def check_config(config: RunConfig) -> list[str]:
    """Every mistake that the schema cannot see, one sentence each; empty where the run may start."""
    document = Document()
    document.tree = cast(dict[str, Raw], plain(config, (), document))
    _check(document)
    return list(document.mistakes)


def _check(document: Document) -> None:
    parts = Parts.of(document)
    for check in _CHECKS:
        for path, sentence in check(parts):
            document.add(path, sentence)


@dataclass(frozen=True)
class Parts:
    """A configuration taken apart.

    Fields:
        document: what was written.
        sections: key path -> section, where that section by itself is valid.
        stages: the stages in the order in which they run.
    """

    document: Document
    sections: dict[KeyPath, Section]
    stages: tuple[StageName, ...]

    @classmethod
    def of(cls, document: Document) -> Parts:
        sections = dict(_valid_sections(document.tree, outline.root(), ()))
        written = document.value(("pipeline",))
        order = written if isinstance(written, list) and written else list(STAGES)
        stages = tuple(name for name in STAGES if isinstance(document.value((name,)), dict) and name in order)
        return cls(document, sections, tuple(sorted(stages, key=order.index)))

    def get(self, kind: type[S], *path: str | int) -> S | None:
        """The section at a path, if it is there and valid."""
        found = self.sections.get(path)
        return found if isinstance(found, kind) else None

    def all(self, kind: type[S]) -> Iterator[tuple[KeyPath, S]]:
        return ((path, section) for path, section in self.sections.items() if isinstance(section, kind))

    def before(self, stage: StageName) -> tuple[StageName, ...]:
        return self.stages[: self.stages.index(stage)] if stage in self.stages else ()

    def start_of(self, stage: StageName) -> KeyPath | None:
        """Where the model that a stage starts from is named, seen through what earlier stages make of it.

        None where a model of that stage is written, and wrong.
        """
        if self.document.value((stage, "model")) is not None:
            return (stage, "model") if self.get(ModelSection, stage, "model") else None
        makers = [name for name in self.before(stage) if name in ("sft", "online")]
        return self.start_of(makers[-1]) if makers else ("model",)


def _valid_sections(raw: Raw, node: outline.Node, path: KeyPath) -> Iterator[tuple[KeyPath, Section]]:
    entry = outline.entries(node)
    if isinstance(raw, list) and entry is not None:
        for index, value in enumerate(raw):
            yield from _valid_sections(value, entry, (*path, index))
    here = outline.section(node, raw)
    if here is None or not isinstance(raw, dict):
        return
    with suppress(ValidationError):  # said where the whole is validated; the sections inside may be right
        yield path, outline.class_of(here).model_validate_json(json.dumps(raw), strict=True)
    for key, value in raw.items():
        yield from _valid_sections(value, outline.properties(here)[key], (*path, key))


LONGEST_NAME = 255
"""Bytes of a file's name; the limit of the usual file systems."""


def _output_dir(parts: Parts) -> Iterator[Finding]:
    written = parts.document.value(("output_dir",))
    if not isinstance(written, str):
        return
    folder = Path(written)
    if any(len(name.encode("utf-8", "surrogatepass")) > LONGEST_NAME for name in folder.parts):
        yield ("output_dir",), f"a name in it is longer than {LONGEST_NAME} bytes; choose another output_dir"
        return
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not os.path.isdir(existing):
        yield ("output_dir",), f"{existing} is a file; choose another output_dir"
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield ("output_dir",), f"{existing.absolute()} may not be written to; choose another output_dir"
    elif RunFolder(folder).holds_run() and parts.document.value(("resume",)) != "auto":
        yield ("output_dir",), "holds another run; continue it with resume=auto, or choose another output_dir"


def _purpose(path: KeyPath) -> Literal["sft", "prompts", "pairs"]:
    if path[0] == "sft":
        return "sft"
    return "pairs" if path[0] == "reward" or "annotators" in path else "prompts"


def _datasets(parts: Parts) -> Iterator[Finding]:
    # These imports bring in the libraries that read data.
    from rlhf_ray.data.formats import check_columns

    for path, section in parts.all(DatasetSection):
        for message in check_columns(section, _purpose(path)):
            # The library speaks of `dataset.key=value: sentence`, whatever section it was given.
            for key, value in section:
                if message.startswith(f"dataset.{key}={value}: "):
                    yield (*path, key), message.removeprefix(f"dataset.{key}={value}: ")
                    break
            else:
                yield path, message


def _models(parts: Parts) -> Iterator[Finding]:
    used = {parts.start_of(stage) for stage in parts.stages}
    for path, section in parts.all(ModelSection):
        if path == ("model",) and path not in used:
            continue
        kind: Kind = "either" if path[0] == "reward" else "language"
        for key, sentence in model_mistakes(section, kind):
            yield (*path, key), sentence
    for path, reward in parts.all(ModelReward):
        if reward.path is not None:
            for sentence in path_mistakes(reward.path, "reward"):
                yield (*path, "path"), sentence


def _functions(parts: Parts) -> Iterator[Finding]:
    from rlhf_ray.rewards.functions import import_function

    found = [(path, section.function) for path, section in parts.all(FunctionReward)]
    found += [(path, section.function) for path, section in parts.all(SimulatedAnnotator)]
    named = [((*path, "function"), function) for path, function in found]
    for path, online in parts.all(OnlineSection):
        for key in ("advantage_function", "policy_loss_function"):
            if (function := getattr(online, key)) is not None:
                named.append(((*path, key), function))
    for path, function in named:
        try:
            import_function(function)
        except ConfigError as error:
            yield path, str(error).removeprefix(f"function={function}: ")
        except Exception as error:  # the person's own module runs at import, and may raise anything
            yield path, f"importing it raised {type(error).__name__}: {error}"


def _environments(parts: Parts) -> Iterator[Finding]:
    from rlhf_ray.environments.interface import import_environment, option_mistake

    for path, section in parts.all(EnvironmentSection):
        try:
            found = import_environment(section.class_path)
        except ConfigError as error:
            yield (*path, "class_path"), str(error).removeprefix(f"class_path={section.class_path}: ")
        except Exception as error:  # the person's own module runs at import, and may raise anything
            yield (*path, "class_path"), f"importing it raised {type(error).__name__}: {error}"
        else:
            if (mistake := option_mistake(found, section.options)) is not None:
                yield (*path, "options"), f"{section.class_path} does not take them: {mistake}"
    for path, online in parts.all(OnlineSection):
        if online.max_completion_length > online.max_response_length:
            yield (
                (*path, "max_completion_length"),
                f"one answer would not fit into environment.max_episode_length={online.max_response_length}; "
                "lower it, or raise that",
            )


def _lengths(parts: Parts) -> Iterator[Finding]:
    for stage in parts.stages:
        start = parts.start_of(stage)
        model = parts.get(ModelSection, *start) if start else None
        positions = max_positions(model.path) if model else None
        section = parts.sections.get((stage,))
        if positions is None or section is None:
            continue
        fits = f"and the model is made for {positions}; lower it"
        if isinstance(section, SFTSection | RewardSection) and section.max_length > positions:
            yield (stage, "max_length"), f"texts may have {section.max_length} tokens, {fits}"
        if isinstance(section, PreferencesSection) and section.max_completion_length >= positions:
            yield (
                (stage, "max_completion_length"),
                f"answers may have {section.max_completion_length} tokens, {fits}",
            )
        if isinstance(section, OnlineSection):
            longest = section.max_prompt_length + section.max_response_length
            if longest > positions:
                of_response = (
                    "environment.max_episode_length" if section.environment else "max_completion_length"
                )
                keys = (of_response, "max_prompt_length")
                written = [key for key in keys if parts.document.holds((stage, *key.split(".")))]
                yield (
                    (stage, *(written or [of_response])[0].split(".")),
                    f"max_prompt_length + {of_response} are {longest} tokens, {fits}",
                )


def _inputs(parts: Parts) -> Iterator[Finding]:
    """What a stage takes from an earlier one must be made there."""
    reward_stage = parts.get(RewardSection, "reward")
    if reward_stage and reward_stage.dataset is None and "preferences" not in parts.before("reward"):
        yield ("reward", "dataset"), "missing, and no preferences stage runs before; name a dataset of pairs"
    preferences = parts.get(PreferencesSection, "preferences")
    if preferences and not preferences.annotators:
        yield ("preferences", "annotators"), "must have at least one entry"
    if preferences and preferences.dataset is None:
        asked = [a.name for a in preferences.annotators if not isinstance(a, FileAnnotator)]
        if asked:
            yield (
                ("preferences", "dataset"),
                f"missing; annotator {asked[0]} judges answers to its prompts; name a dataset of prompts",
            )
    for path, reward in parts.all(ModelReward):
        if reward.path is None and "reward" not in parts.before("online"):
            yield path, "has no path, and no reward stage runs before; name a reward model's folder in path"


def _ranks(parts: Parts) -> Iterator[Finding]:
    """Every rank needs a row of every batch."""
    placement = parts.get(PlacementSection, "placement")
    sft, online = parts.get(SFTSection, "sft"), parts.get(OnlineSection, "online")
    if placement is None:
        return
    if sft and sft.batch_size < placement.policy.count:
        yield ("placement", "policy", "count"), f"more ranks than rows in sft.batch_size={sft.batch_size}"
    if online:
        size = online.samples_per_step // online.num_mini_batches
        for role, count in (("policy", placement.policy.count), ("critic", placement.critic.count)):
            if size < count:
                yield (
                    ("placement", role, "count"),
                    f"more ranks than a mini-batch has samples (prompts_per_step * num_generations / "
                    f"num_mini_batches = {size}); lower it, or raise online.prompts_per_step",
                )


def _engine(parts: Parts) -> Iterator[Finding]:
    engine = parts.get(EngineSection, "engine")
    if engine and engine.backend == "transformers" and engine.tensor_parallel_size > 1:
        yield (
            ("engine", "tensor_parallel_size"),
            "the transformers backend runs on one device; use 1, or backend: vllm",
        )


def _logging(parts: Parts) -> Iterator[Finding]:
    logging = parts.get(LoggingSection, "logging")
    wandb = logging.wandb if logging else None
    if wandb and wandb.mode == "online" and wandb.api_key is None and not _has_wandb_login():
        yield (
            ("logging", "wandb", "mode"),
            "there is no API key; set the environment variable WANDB_API_KEY, or use mode: offline",
        )


def _has_wandb_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return "api.wandb.ai" in netrc.netrc().hosts  # where `wandb login` writes
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


_CHECKS: tuple[Callable[[Parts], Iterator[Finding]], ...] = (
    _output_dir,
    _datasets,
    _models,
    _functions,
    _environments,
    _lengths,
    _inputs,
    _ranks,
    _engine,
    _logging,
)
