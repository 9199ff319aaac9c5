"""What every stage needs: models, datasets, actors, and the surroundings of its loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import TypeVar

import torch

from actors.group import ActorGroup
from launch.artefacts import Artefacts
from launch.memory import PROCESS, model_size, trained_memory
from launch.placement import Capacity, Placement, RoleDemand
from launch.recovery import Recoveries
from rlhf_ray.config.loading import dump_config
from rlhf_ray.config.schema import DatasetSection, ModelSection, OptimizerSection, RunConfig
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.loading import Table, load_rows
from rlhf_ray.data.skipped import Skipped
from rlhf_ray.engines.deepspeed_engine import World
from rlhf_ray.errors import DataError, WorkerLost
from rlhf_ray.loops.checkpoints import Checkpoints
from rlhf_ray.loops.stage_run import StageRun
from rlhf_ray.models.loading import eos_token_ids, load_tokenizer, materialise
from rlhf_ray.reporting.metrics_log import MetricsLog
from rlhf_ray.reporting.progress import Progress
from rlhf_ray.reporting.run_folder import RECOVERIES_FILE, RunFolder
from rlhf_ray.seeds import derive_seed
from rlhf_ray.workers.model_worker import WorkerSpec

Example = TypeVar("Example")


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Say which dataset it is whose rows cannot be used; a stage has several."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error) if source in str(error) else f"{source}: {error}") from error


@dataclass
class StageContext:
    """
    Fields:
        name: of this turn of the stage; its folder has it too.
        turn: 1, and more where the pipeline has the stage again.
        artefacts: what earlier stages made.
        data, parents: filled in as the stage reads them: dataset -> fingerprint, `model` -> folder or name.
    """

    config: RunConfig
    name: str
    turn: int
    artefacts: Artefacts
    folder: RunFolder
    progress: Progress
    interrupt: Event
    data: dict[str, str] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)
    recoveries: Recoveries = field(init=False, repr=False)

    def __post_init__(self) -> None:
        path, limit = self.folder.path / RECOVERIES_FILE, self.config.cluster.max_restarts
        self.recoveries = Recoveries(path, limit, self.progress.message)

    @property
    def seed(self) -> int:
        """Of all that is sampled and shuffled: a stage that runs again gives other answers, in another order.

        What `limit` chooses and what is held out is the run's, so that later turns are judged by prompts that
        earlier ones were not trained on.
        """
        return self.config.seed if self.turn == 1 else derive_seed(self.config.seed, self.turn)

    # Models

    def model(
        self, role: str, section: ModelSection | None, default: ModelSection | None = None
    ) -> ModelSection:
        """The model that the section names, or else the newest one of the pipeline; noted as a parent."""
        chosen = section or default or self.artefacts.policy
        self.parents[role] = chosen.path
        # A folder on disk, so that vLLM and every actor load the same files; the cache makes this cheap.
        found = materialise(chosen)
        # Actors may run in another folder than the driver.
        absolute = {"path": str(found.resolve())}
        template = chosen.chat_template
        if template is not None and not template.startswith("embedded:"):
            absolute["chat_template"] = str(Path(template).resolve())
        return chosen.model_copy(update=absolute)

    def formatter(self, model: ModelSection) -> ChatFormatter:
        tokenizer = load_tokenizer(model)
        return ChatFormatter(tokenizer, eos_token_ids(model, tokenizer))

    # Data

    def examples(
        self, section: DatasetSection, convert: Callable[[Table], tuple[list[Example], Skipped]]
    ) -> list[Example]:
        table = load_rows(section, self.config.seed)
        self.data[table.source] = table.fingerprint
        with naming(section.path):
            examples, skipped = convert(table)
        self.report_skipped(section.path, skipped)
        return examples

    def report_skipped(self, source: str, skipped: Skipped) -> None:
        if len(skipped) or skipped.truncated:
            self.progress.message(f"{source}: {skipped}")

    # Actors

    @contextmanager
    def placement(self, demands: Sequence[RoleDemand]) -> Iterator[Placement]:
        """The stage's resources. On leaving, every actor is closed and the resources are given back."""
        config = self.config
        placement = Placement(
            demands,
            config.cluster,
            self.folder,
            config.placement,
            losses=self.recoveries,
            say=self.progress.message,
        )
        try:
            yield placement
        except WorkerLost:
            # Those that wait for what is lost would hang.
            placement.release(timeout=1.0)
            raise
        except BaseException:
            placement.release()
            raise
        placement.release()

    def demand_trained(self, role: str, model: ModelSection) -> RoleDemand:
        section = getattr(self.config.placement, role)
        memory = trained_memory(model_size(model), self.config.training, section.count)
        return RoleDemand(role, section, self.main_memory(memory))

    def main_memory(self, on_cpu: int) -> int:
        """Bytes of main memory of an actor: with GPUs the model lives there, unless it waits here."""
        config = self.config
        is_moved = config.placement.mode != "auto" or config.training.offload_optimizer != "none"
        return PROCESS if Capacity.of_cluster().gpus and not is_moved else on_cpu

    def build_trained(
        self,
        placement: Placement,
        group: ActorGroup,
        factory: str,
        optimizer: OptimizerSection,
        num_steps: int,
        **options: object,
    ) -> None:
        """Begin to build the ranks of a trained model; see `Placement.wait_until_built`.

        Args:
            group: of a role of the placement, started.
            factory: `module:Class` in `rlhf_ray.workers`.
            num_steps: optimizer steps of the whole stage.
            options: further arguments of the worker.
        """
        specs = [
            WorkerSpec(
                optimizer=optimizer,
                training=self.config.training,
                world=world,
                total_steps=num_steps,
                seed=self.seed,
            )
            for world in self.worlds(placement, group)
        ]
        arguments = [{"spec": spec, **options} for spec in specs]
        group.build(f"rlhf_ray.workers.{factory}", arguments, self.config.cluster.start_timeout)

    @staticmethod
    def worlds(placement: Placement, group: ActorGroup) -> list[World]:
        """Of each rank of a group that computes together."""
        share, nodes = placement.shares[group.name], placement.node_numbers(group.name)
        master = group.address()
        return [
            World(rank, len(group), master, share.threads, share.gpus > 0, nodes)
            for rank in range(len(group))
        ]

    @staticmethod
    def device(placement: Placement, role: str) -> torch.device:
        # Ray shows an actor only its own GPU.
        return torch.device("cuda", 0) if placement.shares[role].gpus else torch.device("cpu")

    # The loop's surroundings

    @property
    def checkpoints(self) -> Checkpoints:
        settings = self.config.checkpoint
        folder = self.folder.path.resolve() / "checkpoints"
        return Checkpoints(folder, settings.every, settings.keep_last, settings.keep_best)

    @contextmanager
    def stage_run(self, placement: Placement, first_step: int = 0) -> Iterator[StageRun]:
        """Args: first_step: steps of the stage that another loop did before."""
        run = StageRun(
            name=self.name,
            folder=self.folder,
            seed=self.seed,
            checkpoints=self.checkpoints,
            progress=self.progress,
            open_log=self._open_log,
            interrupt=self.interrupt,
            timings=placement.timeline.take,
            recoveries=self.recoveries,
            first_step=first_step,
        )
        try:
            yield run
        finally:
            run.close()

    def _open_log(self, start: int) -> MetricsLog:
        config = dump_config(self.config)
        return MetricsLog(self.folder, self.name, self.config.logging, config=config, resume_step=start)
