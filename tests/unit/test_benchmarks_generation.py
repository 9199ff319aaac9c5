"""The fixed work of the generation benchmarks, who gets what of it, and what is refused."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.generation import Answers, Shape, Work
from benchmarks.peer import Peer
from benchmarks.rollout import Arm
from benchmarks.rollout_sweep import (
    Deployment,
    Machine,
    Point,
    generate_by_peers,
    parser,
    plot,
    scaled,
    sweep_of,
    table_of,
)
from launch.cli import main
from rlhf_ray.errors import RlhfRayError, UserError, WorkerError

SHAPE = Shape(num_prompts=5, num_generations=2, prompt_lengths=[3, 4], lengths=[7, 1, 2], vocabulary=50)


def answers_to(work: Work) -> list[list[int]]:
    """Tokens that say which request they belong to."""
    samples = itertools.product(work.prompts.ids.tolist(), range(work.sampling.num_generations))
    return [
        [work.seed, prompt, sample] + [0] * (length - 3) if length > 3 else [prompt] * length
        for (prompt, sample), length in zip(samples, work.lengths, strict=True)
    ]


class Echo:
    """What a peer serves in these tests."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def generate(self, work: Work) -> Answers:
        return Answers(self.seconds, answers_to(work))

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)

    def fail(self) -> None:
        raise ValueError("not today")

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def die(self) -> None:
        os._exit(3)


def echo(folder: Path, seconds: float = 1.0, timeout: float = 60.0, **environment: str) -> Peer:
    factory = f"{__name__}:Echo"
    return Peer(
        factory, {"seconds": seconds}, log=folder / "echo.log", environment=environment, timeout=timeout
    )


def test_every_call_asks_for_other_tokens_of_the_same_amount() -> None:
    first, again, second = SHAPE.work(0), SHAPE.work(0), SHAPE.work(1)
    assert first.lengths == [7, 1, 2, 7, 1, 2, 7, 1, 2, 7] and first.num_tokens == 37
    assert first.prompts.token_ids.lengths.tolist() == [3, 4, 3, 4, 3]
    assert first.prompts.token_ids.values.tolist() == again.prompts.token_ids.values.tolist()
    assert first.prompts.token_ids.values.tolist() != second.prompts.token_ids.values.tolist()
    assert second.lengths == first.lengths and SHAPE.max_model_len == 11


def test_shares_keep_every_request_its_length() -> None:
    shares = SHAPE.work(0).shares(2)
    assert [share.prompts.ids.tolist() for share in shares] == [[0, 1, 2], [3, 4]]
    assert [share.lengths for share in shares] == [[7, 1, 2, 7, 1, 2], [7, 1, 2, 7]]
    assert len(SHAPE.work(0).shares(9)) == 5  # no engine is asked for nothing


def test_an_arm_gives_tokens_a_second_and_compares_the_answers_call_by_call() -> None:
    answered: dict[int, list[list[int]]] = {}
    ours = Arm(SHAPE, lambda work: Answers(2.0, answers_to(work)), answered)
    theirs = Arm(SHAPE, lambda work: Answers(4.0, answers_to(work)), answered)
    assert [ours(), ours(), theirs(), theirs()] == [18.5, 18.5, 9.25, 9.25]
    assert ours.seconds == [2.0, 2.0] and len(answered) == 2

    def wrong(work: Work) -> Answers:
        tokens = answers_to(work)
        tokens[3][0] += 1
        return Answers(1.0, tokens)

    with pytest.raises(RlhfRayError, match=r"answer 1 of 10 requests differently, the first is request 3"):
        Arm(SHAPE, wrong, answered)()
    with pytest.raises(RlhfRayError, match="should have"):
        Arm(SHAPE, lambda work: Answers(1.0, [*answers_to(work)[:-1], [0]]), {})()


def test_scaled_lengths_keep_their_shape_and_have_the_mean() -> None:
    assert scaled([1, 2, 3], 20, 3) == [10, 20, 30]
    assert scaled([1, 2, 3], 20, 6) == [10, 20, 30, 10, 20, 30]
    assert scaled([1, 1, 1000], 3, 3) == [1, 1, 9]
    assert np.mean(scaled(range(1, 41), 128, 16)) == pytest.approx(128, abs=1)


@pytest.mark.parametrize(
    ("machine", "deployment", "said"),
    [
        (Machine(2, 0), Deployment(2, 1), None),
        (Machine(2, 0), Deployment(3, 1), "--engines 3: an engine needs a core, and there are 2"),
        (Machine(2, 0), Deployment(1, 2), "--tensor-parallel 2: an engine is spread over GPUs"),
        (Machine(2, 8), Deployment(4, 2), None),
        (Machine(2, 4), Deployment(4, 2), "takes 8 GPUs, and there are 4"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_starts(
    machine: Machine, deployment: Deployment, said: str | None
) -> None:
    mistakes = list(machine.mistakes(deployment))
    assert mistakes == [] if said is None else said in mistakes[0]


def test_every_mistake_of_a_sweep_is_said_at_once(tmp_path: Path) -> None:
    args = parser().parse_args(["--engines", "1", "3", "--tensor-parallel", "1", "2"])
    with pytest.raises(UserError) as caught:
        sweep_of(args, tmp_path, Machine(2, 0), print)
    assert str(caught.value).count("--tensor-parallel 2") == 1 and "--engines 3" in str(caught.value)


def test_the_command_refuses_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "rollout", "--sweep", "--model", "./nowhere"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rlhf-ray: --model ./nowhere: no such folder") and "Traceback" not in error


def test_each_engine_sees_its_own_devices() -> None:
    assert Machine(16, 8).devices(Deployment(2, 4), 1) == {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    assert Machine(2, 0).devices(Deployment(2, 1), 1) == {}
    assert Machine(5, 0).threads(Deployment(2, 1)) == 2 and Machine(16, 8).threads(Deployment(2, 4)) == 1


def test_peers_share_the_work_and_the_slowest_counts(tmp_path: Path) -> None:
    work = SHAPE.work(4)
    with echo(tmp_path, 1.0) as fast, echo(tmp_path, 3.0) as slow:
        answers = generate_by_peers([fast, slow], work)
    assert answers == Answers(3.0, answers_to(work))


def test_a_peer_has_its_own_environment_and_says_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ONLY_THERE", raising=False)
    with echo(tmp_path, ONLY_THERE="yes", timeout=20.0) as peer:
        assert peer.call("variable", "ONLY_THERE").result() == "yes" and "ONLY_THERE" not in os.environ
        with pytest.raises(WorkerError, match=r"^Echo\.fail: ValueError: not today$"):
            peer.call("fail").result()
        assert "not today" in (tmp_path / "echo.log").read_text()
        with pytest.raises(WorkerError, match=r"Echo\.die: its process ended"):
            peer.call("die").result()


def test_a_peer_is_not_waited_for_longer_than_agreed(tmp_path: Path) -> None:
    with echo(tmp_path).wait_until_built() as peer:
        peer._timeout = 0.2
        with pytest.raises(WorkerError, match=r"Echo\.sleep: no answer within 0\.2 s"):
            peer.call("sleep", 2.0).result()


def test_the_sweep_is_shown_and_drawn(tmp_path: Path) -> None:
    one = Deployment(1, 1)
    points = [
        Point("rlhf_ray", one, 8, 128, 1000, [1.0, 2.0, 4.0]),
        Point("vllm", one, 8, 128, 1000, [2.0, 2.5]),
        Point("rlhf_ray", one, 16, 128, 2000, [2.0]),
    ]
    assert points[0].throughput == 500
    table = table_of(points)
    assert [str(column.header) for column in table.columns][3:] == ["rlhf_ray", "vllm", "ours / bare"]
    cells = [list(column.cells) for column in table.columns]
    assert cells[3] == ["500", "1000"] and cells[4] == ["444.4", ""] and cells[5] == ["1.12", ""]
    plot(points, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 0
