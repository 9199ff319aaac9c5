"""Roles as a run builds them, without the run: what the benchmarks of whole actors measure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from launch.artefacts import Artefacts
from launch.cluster import cluster
from launch.number_formats import with_number_formats
from launch.stages.context import StageContext
from rlhf_ray.config.loading import load_config
from rlhf_ray.config.model_checks import path_mistakes
from rlhf_ray.config.schema import EMBEDDED_MODEL, ModelSection
from rlhf_ray.errors import ModelError
from rlhf_ray.models.loading import materialise
from rlhf_ray.reporting.progress import QuietProgress
from rlhf_ray.reporting.run_folder import RunFolder

CONFIG = "configs/grpo-arithmetic.yaml"


def model_folder(name: str | None) -> Path:
    """A folder on this machine; a hub name is downloaded.

    Raises:
        ModelError: there is no such model.
    """
    name = name or EMBEDDED_MODEL
    mistakes = list(path_mistakes(name, "language", has_template=True))
    if mistakes:
        raise ModelError(f"--model {name}: {'; '.join(mistakes)}")
    return materialise(ModelSection(path=name)).resolve()


@contextmanager
def open_stage(model: Path, folder: Path, overrides: Sequence[str] = ()) -> Iterator[StageContext]:
    """An online stage on a cluster of its own; nothing is built yet.

    Args:
        folder: for logs and lineage. overrides: of the packaged configuration, as on the command line.
    """
    words = [f"output_dir={json.dumps(str(folder))}", f"model.path={json.dumps(str(model))}", *overrides]
    config = load_config(CONFIG, words)
    with cluster(config.cluster):
        yield StageContext(
            config=with_number_formats(config, print),
            name="online",
            turn=1,
            artefacts=Artefacts.at_start(config),
            folder=RunFolder(config.output_dir),
            progress=QuietProgress(),
            interrupt=Event(),
        )
