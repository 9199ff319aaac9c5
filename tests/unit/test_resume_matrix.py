"""Every kind of stage, interrupted in every way, ends as if it had not been: bit for bit.

What is compared: all that the last checkpoint holds (weights, optimizer, schedule, random state, cursor, KL
controller, normalisers), the metrics of every step, every sample, and what the loop returns. The first cells
run by default; all of them with

    python -m pytest -m "slow or not slow" tests/unit/test_resume_matrix.py
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch

from rlhf_ray.config.schema import ModelSection
from rlhf_ray.engines.deepspeed_engine import World, no_foreign_code
from rlhf_ray.errors import Interrupted
from rlhf_ray.loops import checkpoints
from rlhf_ray.reporting.lineage import read_lineage
from rlhf_ray.reporting.metrics_log import MetricsLog
from rlhf_ray.types import Metrics
from rlhf_ray.workers.policy import PolicyWorker
from tests.fakes import PowerCut, Watcher, cut_power
from tests.local_roles import logged, stage_run
from tests.ranks import EXACT, run_ranks, worker_spec
from tests.resume_kinds import KINDS, STEPS, WITH_ENGINES, WITHOUT_CHECKPOINTS, Place, lagging
from tests.tiny import tiny_model_folder

EVERY = 2
"""Steps between checkpoints: of STEPS, the last is saved."""


class From(Watcher):
    """Acts after a later step too: the run may have been further when it was taken up."""

    def step(self, step: int, metrics: Metrics) -> None:
        super().step(min(step, self.after), metrics)


@dataclass(frozen=True)
class Life:
    """One process of a run, until it is interrupted.

    Fields:
        ctrl_c, power_cut: after so many steps. saving: the power goes while that checkpoint is written.
        unlogged: it goes between what a step made and its metrics.
        num_engines, one_by_one: as in `Place`.
    """

    ctrl_c: int | None = None
    power_cut: int | None = None
    saving: int | None = None
    unlogged: int | None = None
    num_engines: int = 1
    one_by_one: bool = False

    def play(self, kind: str, model: ModelSection, folder: Path) -> object:
        event = Event()
        watcher = None
        if self.ctrl_c is not None:
            watcher = From(self.ctrl_c, event.set)
        elif self.power_cut is not None:
            watcher = From(self.power_cut, cut_power)
        run = stage_run(folder, watcher, EVERY, event)
        with (
            _cut_off(checkpoints, "sync_tree", self._while_saving),
            _cut_off(MetricsLog, "log", self._unlogged),
        ):
            return _played(kind, Place(model, run, self.num_engines, self.one_by_one))

    def _while_saving(self, folder: Path) -> bool:
        return self.saving is not None and f"{self.saving:06d}" in folder.name

    def _unlogged(self, _: MetricsLog, step: int, *rest: object) -> bool:
        return step + 1 == self.unlogged


@contextmanager
def _cut_off(owner: object, name: str, is_now: Callable[..., bool]) -> Iterator[None]:
    """The power goes where a function is called with certain arguments."""
    original = getattr(owner, name)

    def called(*arguments: object, **options: object) -> object:
        if is_now(*arguments):
            raise PowerCut
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, called)
        yield


def _played(kind: str, place: Place) -> object:
    play = lagging if kind == "lag" else KINDS[kind]
    try:
        return play(place)
    finally:
        place.run.close()


WAYS: dict[str, tuple[Life, ...]] = {
    "Ctrl-C at the end of an epoch": (Life(ctrl_c=3),),
    "power cut while saving": (Life(saving=4),),
    "power cut between files and metrics": (Life(unlogged=3),),
    "Ctrl-C after the first step": (Life(ctrl_c=1),),
    "Ctrl-C at a checkpoint": (Life(ctrl_c=2),),
    "Ctrl-C after the last step": (Life(ctrl_c=STEPS),),
    "power cut before the first checkpoint": (Life(power_cut=1),),
    "power cut after a checkpoint": (Life(power_cut=3),),
    "power cut while saving the first": (Life(saving=2),),
    "again and again": (Life(ctrl_c=1), Life(saving=2), Life(power_cut=2), Life(ctrl_c=3), Life(saving=4)),
}
QUICK = ("Ctrl-C at the end of an epoch", "power cut while saving")
ALSO_QUICK = [("preferences", "power cut between files and metrics"), ("ppo", "again and again")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(tiny_model_folder(tmp_path_factory.mktemp("tiny"))))


@dataclass
class Whole:
    """Runs that nothing interrupted, each made once."""

    folder: Path
    made: dict[str, object] = field(default_factory=dict)

    def of(self, kind: str, model: ModelSection, one_by_one: bool = False) -> tuple[object, Path]:
        name = f"{kind}{', one by one' if one_by_one else ''}"
        folder = self.folder / name / "run"
        if name not in self.made:
            self.made[name] = Life(one_by_one=one_by_one).play(kind, model, folder)
        return self.made[name], folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"))


def cells() -> list[object]:
    """Every kind in every way; most of them are slow only because they are many."""
    table: list[object] = []
    for kind in KINDS:
        for way in WAYS:
            if kind in WITHOUT_CHECKPOINTS and any(life.saving for life in WAYS[way]):
                continue
            is_quick = way in QUICK or (kind, way) in ALSO_QUICK
            marks = () if is_quick else (pytest.mark.slow,)
            table.append(pytest.param(kind, way, marks=marks, id=f"{kind}: {way}"))
    return table


@pytest.mark.parametrize(("kind", "way"), cells())
def test_resumed_equals_uninterrupted(
    model: ModelSection, whole: Whole, tmp_path: Path, kind: str, way: str
) -> None:
    interrupt_and_compare(model, whole, tmp_path / "run", kind, [*WAYS[way], Life()])


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "ppo" else (pytest.mark.slow,)) for kind in WITH_ENGINES]
)
@pytest.mark.parametrize("numbers", [(1, 2), (3, 1)], ids=str)
def test_resumed_with_another_number_of_engines(
    model: ModelSection, whole: Whole, tmp_path: Path, kind: str, numbers: tuple[int, int]
) -> None:
    """The seed of a sample is its own, whichever engine samples it and whatever else that is asked. Rows are
    computed one by one: in batches of other sizes the last bits of log-probs would be others."""
    lives = [
        Life(ctrl_c=2, num_engines=numbers[0], one_by_one=True),
        Life(num_engines=numbers[1], one_by_one=True),
    ]
    interrupt_and_compare(model, whole, tmp_path / "run", kind, lives)


def interrupt_and_compare(
    model: ModelSection, whole: Whole, folder: Path, kind: str, lives: list[Life]
) -> None:
    expected, reference = whole.of(kind, model, lives[-1].one_by_one)
    folder.mkdir()
    for life in lives[:-1]:
        with pytest.raises((Interrupted, PowerCut)):
            life.play(kind, model, folder)
    assert lives[-1].play(kind, model, folder) == expected
    assert logged(folder) == logged(reference)
    assert_same_checkpoint(folder, reference)
    assert_same_samples(folder, reference)


def last_checkpoint(folder: Path) -> Path | None:
    return max((folder / "checkpoints").glob("step-*"), default=None)


def assert_same_checkpoint(folder: Path, reference: Path) -> None:
    ours, theirs = last_checkpoint(folder), last_checkpoint(reference)
    if theirs is None:
        assert ours is None
        return
    assert ours is not None and ours.name == theirs.name
    state = [json.loads((path / "state.json").read_text()) for path in (ours, theirs)]
    assert state[0] == state[1]
    files = sorted(path.relative_to(theirs) for path in theirs.rglob("*.pt"))
    assert len(files) >= 2, "a model, and the random state of its rank"
    for name in files:
        with no_foreign_code():
            left, right = (torch.load(path / name, weights_only=True) for path in (ours, theirs))
        assert_same(left, right, str(name))


def assert_same(left: object, right: object, where: str) -> None:
    """To the last bit, however deep."""
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, f"{where}.{index}")
    elif type(left).__eq__ is object.__eq__ and left is not None:
        assert_same(vars(left), vars(right), where)
    else:
        assert left == right, where


def assert_same_samples(folder: Path, reference: Path) -> None:
    names = sorted(path.name for path in (reference / "rollouts").glob("*"))
    assert names == sorted(path.name for path in (folder / "rollouts").glob("*"))
    for name in names:
        ours, theirs = (path / "rollouts" / name for path in (folder, reference))
        if name.endswith(".parquet"):
            assert read_lineage(ours) == read_lineage(theirs), name
        elif name != "origin.json":  # where the principles were read
            assert ours.read_bytes() == theirs.read_bytes(), name
    judged = [path / "eval.jsonl" for path in (folder, reference)]
    if judged[1].exists():
        assert judged[0].read_bytes() == judged[1].read_bytes()


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=() if way in QUICK else (pytest.mark.slow,))
        for way in WAYS
        if "files" not in way
    ],
)
def test_ahead_of_the_trainer_no_prompt_is_lost_or_comes_twice(
    model: ModelSection, whole: Whole, tmp_path: Path, way: str
) -> None:
    """What was in flight is answered anew by the weights of the checkpoint, so the answers are others; which
    prompts a step trains on, and how many answers, are the same."""
    _, reference = whole.of("lag", model)
    for life in WAYS[way]:
        with pytest.raises((Interrupted, PowerCut)):
            life.play("lag", model, tmp_path)
    Life().play("lag", model, tmp_path)
    for step in range(STEPS):
        name = f"rollouts/step-{step:06d}.parquet"
        ours, theirs = (read_lineage(path / name) for path in (tmp_path, reference))
        assert [(s.prompt_id, s.sample_id) for s in ours] == [(s.prompt_id, s.sample_id) for s in theirs]
        assert all(max(0, step - 2) <= sample.version_min <= step for sample in ours)


def drawn_again(world: World, folder: str, model: str) -> tuple[list[float], list[float]]:
    """On a rank: numbers drawn after saving, and after loading."""
    worker = PolicyWorker(ModelSection(path=model), worker_spec(EXACT, world=world))
    worker.save_state(Path(folder))
    torch.distributed.barrier()
    found = []
    for _ in range(2):
        found.append([torch.rand(1).item(), np.random.rand(), random.random()])
        worker.load_state(Path(folder))
    return found[0], found[1]


@pytest.mark.slow
def test_every_rank_has_a_random_state_of_its_own(model: ModelSection, tmp_path: Path) -> None:
    first, second = run_ranks(drawn_again, 2, tmp_path, str(tmp_path / "state"), model.path)
    for after_saving, after_loading in (first, second):
        assert after_saving == after_loading
    assert all(one != other for one, other in zip(first[0], second[0], strict=True))


def test_nothing_of_the_table_is_left_out() -> None:
    """The document shows the same rows and columns."""
    text = (Path(__file__).parents[2] / "docs" / "resume.md").read_text()
    for name in [*KINDS, *WAYS]:
        assert f"| {name} " in text, name
