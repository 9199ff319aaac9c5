"""A run from its configuration to its results: the stages one after the other, each in its folder."""

from __future__ import annotations

from contextlib import ExitStack
from datetime import datetime

from rich.console import Console

from launch.artefacts import Artefacts
from launch.cluster import cluster
from launch.interrupts import stopping_after_a_step, stopping_by_itself
from launch.number_formats import with_number_formats
from launch.stages import STAGE_RUNNERS
from launch.stages.context import StageContext
from rlhf_ray.config.checks import check_config
from rlhf_ray.config.loading import dump_config
from rlhf_ray.config.schema import RunConfig, StageName, seconds_left, turn_names
from rlhf_ray.errors import ConfigError, Interrupted
from rlhf_ray.reporting.capture import capture_library_output
from rlhf_ray.reporting.metrics_log import RunResult, load_run
from rlhf_ray.reporting.progress import open_progress
from rlhf_ray.reporting.run_folder import RunFolder, RunRecord
from rlhf_ray.reporting.summary import render_run


def run(config: RunConfig, *, quiet: bool = False) -> RunResult:
    """Do all stages that are not done yet.

    Args:
        quiet: show no progress, for scripts and notebooks.

    Returns:
        Metrics of every step of every stage, and the folders.

    Raises:
        ConfigError: with every mistake that can be found before anything starts.
        UserError: a dataset, a model or the cluster is not as the configuration says.
        Interrupted: Ctrl-C, SIGTERM or the deadline; the state is saved.
        KeyboardInterrupt: one of them for the second time, or while Ray was starting.
        RlhfRayError: the run failed.
    """
    mistakes = check_config(config)
    if mistakes:
        raise ConfigError(*mistakes)
    return run_checked(config, quiet=quiet)


def run_checked(config: RunConfig, *, quiet: bool = False) -> RunResult:
    """`run`, for a configuration of which `load_checked` has said that it has no mistake."""
    root = RunFolder(config.output_dir)
    is_pipeline = bool(config.pipeline)
    names = turn_names(config.stages)
    record = RunRecord(name="pipeline", config=dump_config(config), stages=names if is_pipeline else ())
    if config.resume == "never":
        root.refuse_foreign(record)  # before the first line of a log is written into it
    with ExitStack() as stack:
        terminal = stack.enter_context(capture_library_output(root.logs / "driver.log"))
        progress = open_progress(names, terminal, quiet=quiet)
        stack.callback(progress.close)
        interrupt = stack.enter_context(stopping_after_a_step(progress.message))
        if config.checkpoint.deadline is not None:
            left = seconds_left(config.checkpoint.deadline, datetime.now())
            stack.enter_context(stopping_by_itself(left, interrupt, progress.message))
        artefacts = Artefacts.at_start(config)
        folders = {name: root.stage(name) if is_pipeline else root for name in names}
        done = {name for name, folder in folders.items() if config.resume == "auto" and _is_done(folder)}
        if len(done) < len(folders):
            stack.enter_context(cluster(config.cluster))
            config = with_number_formats(config, progress.message)
        if is_pipeline:
            root.begin(record, resume=config.resume == "auto")
            stack.enter_context(root.recording_outcome())
        for index, (name, folder) in enumerate(folders.items()):
            stage, turn = config.stages[index], config.stages[: index + 1].count(config.stages[index])
            if name in done:
                progress.message(f"{name}: done before")
            else:
                context = StageContext(config, name, turn, artefacts, folder, progress, interrupt)
                _run_stage(stage, context)
            artefacts = artefacts.after(stage, folder)
        progress.close()
        if is_pipeline:
            root.finish("done")
        if not quiet:
            render_run(root.path, Console(file=terminal))
    return load_run(config.output_dir)


def _run_stage(stage: StageName, context: StageContext) -> None:
    """Run the stage, or what is left of it."""
    config, folder = context.config, context.folder
    if context.interrupt.is_set():
        raise Interrupted(f"{context.name}: stopped before it began; go on with --resume")
    folder.begin(RunRecord(name=context.name, config=dump_config(config)), resume=config.resume == "auto")
    with folder.recording_outcome():
        metrics = context.recoveries.run(lambda: STAGE_RUNNERS[stage](context))
        folder.record_origin(context.data, context.parents)
        if best := context.checkpoints.take_best_model(folder.path / "best"):
            context.progress.message(f"{context.name}: the best model is in {folder.path / 'best'} ({best})")
        folder.finish("done", metrics)
        # Its model is saved; several times the model's size of optimizer state is of no more use.
        context.checkpoints.clear()


def _is_done(folder: RunFolder) -> bool:
    return folder.run_path.exists() and folder.read().status == "done"
