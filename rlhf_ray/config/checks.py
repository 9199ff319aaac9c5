"""Every check that needs no cluster and no model in memory: files, models, functions, and what fits to what.

The checks look at sections, each validated by itself, so that a missing dataset is reported beside a misspelt
key in another section, or in the same one.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

from rlhf_ray.config.checkpoint_checks import checkpoint_mistakes
from rlhf_ray.config.document import Document, KeyPath, Raw, plain
from rlhf_ray.config.loading import parse_document, read_document
from rlhf_ray.config.model_checks import Kind, linear_names, max_positions, model_mistakes
from rlhf_ray.config.parts import Parts
from rlhf_ray.config.placement_checks import placement_mistakes
from rlhf_ray.config.preference_checks import preference_mistakes
from rlhf_ray.config.reward_checks import reward_mistakes
from rlhf_ray.config.schema import (
    ConstitutionAnnotator,
    ConstitutionSection,
    DatasetSection,
    EngineSection,
    EnvironmentSection,
    FileAnnotator,
    FunctionReward,
    LoggingSection,
    ModelReward,
    ModelSection,
    OnlineSection,
    PairsSection,
    PreferencesSection,
    Reward,
    RunConfig,
    SFTSection,
    SimulatedAnnotator,
    StageName,
    TrainingSection,
)
from rlhf_ray.config.schema.rewards import Source
from rlhf_ray.errors import ConfigError
from rlhf_ray.reporting.run_folder import RunFolder

Finding = tuple[KeyPath, str]


def load_checked(
    source: str | Path | Mapping[str, object], overrides: Sequence[str] = (), elsewhere: Sequence[Path] = ()
) -> RunConfig:
    """`load_config`, with the checks of this module run whether or not the schema is content.

    Args:
        elsewhere: folders that the run will see, and this machine need not: what is named in them and is not
            here is not judged.

    Raises:
        ConfigError: every mistake, one sentence each.
    """
    document = read_document(source, overrides)
    config = parse_document(document)
    _check(document, elsewhere)
    if config is None or document.mistakes:
        raise ConfigError(*document.mistakes)
    return config


def check_config(config: RunConfig) -> list[str]:
    """Every mistake that the schema cannot see, one sentence each; empty where the run may start."""
    document = Document()
    document.tree = cast(dict[str, Raw], plain(config, (), document))
    _check(document)
    return list(document.mistakes)


def _check(document: Document, elsewhere: Sequence[Path] = ()) -> None:
    parts = Parts.of(document)
    for check in _CHECKS:
        for path, sentence in check(parts):
            if not _is_elsewhere(document.value(path), elsewhere):
                document.add(path, sentence)


def _is_elsewhere(value: Raw, folders: Sequence[Path]) -> bool:
    return (
        isinstance(value, str)
        and any(Path(value).is_relative_to(folder) for folder in folders)
        and not os.path.exists(value)
    )


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


def _purpose(parts: Parts, path: KeyPath) -> Literal["sft", "prompts", "pairs", "labelled answers"]:
    if path[0] == "preference":
        is_unpaired = parts.document.value(("preference", "algorithm")) == "kto"
        return "labelled answers" if is_unpaired else "pairs"
    if path[0] == "sft" or path in (("constitution", "helpful_dataset"), ("constitution", "eval_dataset")):
        return "sft"
    return "pairs" if path[0] == "reward" or "annotators" in path else "prompts"


def _datasets(parts: Parts) -> Iterator[Finding]:
    # These imports bring in the libraries that read data.
    from rlhf_ray.data.formats import check_columns

    for path, section in parts.all(DatasetSection):
        for message in check_columns(section, _purpose(parts, path)):
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


def _rewards(parts: Parts) -> Iterator[Finding]:
    from rlhf_ray.data.formats import reward_columns

    datasets = [parts.get(DatasetSection, "online", key) for key in ("dataset", "eval_dataset")]
    tables = [reward_columns(dataset) for dataset in datasets if dataset is not None] or [None]
    for path, reward in parts.all(Source):
        for columns in tables:
            for key, sentence in reward_mistakes(cast(Reward, reward), columns):
                yield (*path, *key), sentence


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
        except (Exception, SystemExit) as error:  # the person's own module runs, and may raise anything
            yield path, f"importing it raised {type(error).__name__}: {error}"


def _constitutions(parts: Parts) -> Iterator[Finding]:
    from rlhf_ray.data.constitution import load_constitution

    found: list[tuple[KeyPath, ConstitutionSection | ConstitutionAnnotator]] = [
        *parts.all(ConstitutionSection),
        *parts.all(ConstitutionAnnotator),
    ]
    for path, section in found:
        try:
            num_principles = len(load_constitution(section.principles).principles)
        except ConfigError as error:
            for mistake in error.mistakes:
                yield (*path, "principles"), mistake.removeprefix(f"{section.principles}: ")
            continue
        if isinstance(section, ConstitutionAnnotator) and section.num_principles > num_principles:
            yield (*path, "num_principles"), f"the constitution has {num_principles}; ask for fewer"


def _environments(parts: Parts) -> Iterator[Finding]:
    from rlhf_ray.environments.interface import import_environment, option_mistake

    for path, section in parts.all(EnvironmentSection):
        try:
            found = import_environment(section.class_path)
        except ConfigError as error:
            yield (*path, "class_path"), str(error).removeprefix(f"class_path={section.class_path}: ")
        except (Exception, SystemExit) as error:  # the person's own module runs, and may raise anything
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
        if (
            isinstance(section, SFTSection | ConstitutionSection | PairsSection)
            and section.max_length > positions
        ):
            yield (stage, "max_length"), f"texts may have {section.max_length} tokens, {fits}"
        if (
            isinstance(section, PreferencesSection | ConstitutionSection)
            and section.max_completion_length >= positions
        ):
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


def _adapters(parts: Parts) -> Iterator[Finding]:
    """`training.lora.target_modules` must name layers of every model that is trained."""
    training = parts.get(TrainingSection, "training")
    if training is None or training.lora is None or training.lora.target_modules == "all-linear":
        return
    from rlhf_ray.models.adapters import target_mistake

    starts = [parts.start_of(stage) for stage in parts.stages if parts.document.holds((stage, "optimizer"))]
    models = [parts.get(ModelSection, *start) for start in starts if start is not None]
    for path in sorted({model.path for model in models if model and not model.trust_remote_code}):
        layers = linear_names(path)
        if layers is not None and (mistake := target_mistake(layers, training.lora)):
            yield ("training", "lora", "target_modules"), f"in model {path} {mistake}"


def _inputs(parts: Parts) -> Iterator[Finding]:
    """What a stage takes from an earlier one must be made there."""
    learners: tuple[StageName, ...] = ("reward", "preference")
    for stage in learners:
        pairs = parts.sections.get((stage,))
        is_missing = isinstance(pairs, PairsSection) and pairs.dataset is None
        if is_missing and "preferences" not in parts.before(stage):
            yield (stage, "dataset"), "missing, and no preferences stage runs before; name a dataset of pairs"
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


def _streaming(parts: Parts) -> Iterator[Finding]:
    """Giving up stragglers needs engines that answer prompt by prompt."""
    online, engine = parts.get(OnlineSection, "online"), parts.get(EngineSection, "engine")
    if online is None or online.stragglers == "wait":
        return
    whole = "whole batches are answered at once, and no prompt before another; use wait"
    if online.environment is not None:
        yield ("online", "stragglers"), f"with an environment {whole}"
    elif engine and engine.backend != "vllm":
        yield ("online", "stragglers"), f"by the {engine.backend} backend {whole}, or backend: vllm"


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
    _rewards,
    _functions,
    _constitutions,
    _environments,
    _lengths,
    _adapters,
    _inputs,
    preference_mistakes,
    placement_mistakes,
    _streaming,
    checkpoint_mistakes,
    _logging,
)
