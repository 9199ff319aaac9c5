"""What goes with a job, in one zip: the code, the configuration, and the small files that it names."""

from __future__ import annotations

import fnmatch
import os
import subprocess
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rlhf_ray.errors import UserError

MIB = 1 << 20
PACKAGE_LIMIT = 90 * MIB
"""Bytes before compression. Ray's dashboard takes 100 MiB; the head node keeps a package in memory, and every
node unpacks it."""

LEFT_OUT = {
    ".git",
    ".venv",
    "venv",
    ".env",
    "__pycache__",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
    "node_modules",
    "wandb",
}
"""Names of files and folders, wherever they stand."""
OUTPUTS = "runs"
"""Left out at the top: what earlier runs wrote."""
OWN_FOLDER = Path(".rlhf-ray")
"""In the package: what is not the person's own code."""

_EPOCH = (1980, 1, 1, 0, 0, 0)


def code_files(folder: Path, excludes: Sequence[str]) -> dict[Path, Path]:
    """Path in the package -> file here. In a git repository what git ignores stays here.

    Args:
        excludes: patterns of paths below the folder, as in a shell.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"--working-dir {folder}: no such folder")
    listed = _listed_by_git(folder)
    paths = listed if listed is not None else _walked(folder)
    return {path: folder / path for path in sorted(paths) if not _is_left_out(path, excludes)}


def _listed_by_git(folder: Path) -> list[Path] | None:
    """What git tracks or would add; None outside of a repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    paths = {Path(os.fsdecode(name)) for name in done.stdout.split(b"\0") if name}
    # A tracked file may be deleted by now, and a submodule is listed as a folder.
    return [path for path in paths if (folder / path).is_file()]


def _walked(folder: Path) -> list[Path]:
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        found += [Path(root, name).relative_to(folder) for name in files]
    return [path for path in found if (folder / path).is_file()]


def _is_left_out(path: Path, excludes: Sequence[str]) -> bool:
    if path.parts[0] in (OUTPUTS, OWN_FOLDER.name) or LEFT_OUT.intersection(path.parts):
        return True
    tried = [path.as_posix(), *(parent.as_posix() for parent in path.parents), path.name]
    return any(fnmatch.fnmatch(text, pattern.rstrip("/")) for text in tried for pattern in excludes)


def check_size(files: Mapping[Path, Path], what: str) -> None:
    """
    Raises:
        UserError: too much for a package; names the largest files.
    """
    sizes = {name: path.stat().st_size for name, path in files.items()}
    total = sum(sizes.values())
    if total > PACKAGE_LIMIT:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        named = ", ".join(f"{name} ({sizes[name] / MIB:.0f} MiB)" for name in largest)
        raise UserError(
            f"{what}: has {total / MIB:.0f} MiB, and a package may have {PACKAGE_LIMIT // MIB}; the largest "
            f"files are {named}; leave some out with --exclude, or name another --working-dir"
        )


def wheel_contents(wheel: Path) -> Iterator[tuple[str, bytes]]:
    """Its modules and metadata, which work where they are unpacked: the package has no compiled code.

    Raises:
        UserError: it is not such a wheel.
    """
    if not wheel.name.endswith("-none-any.whl"):
        raise UserError(f"--wheel {wheel}: must be a wheel without compiled code, NAME-none-any.whl")
    try:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    yield entry.filename, archive.read(entry)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"--wheel {wheel}: cannot be read ({error})") from error


def write_package(path: Path, files: Mapping[Path, Path], texts: Sequence[tuple[str, bytes]]) -> None:
    """Equal contents make equal files, so that the cluster takes a package only once.

    Args:
        files: path in the package -> file here. texts: path in the package, content.
    """
    contents = dict(texts)
    names = sorted({*contents, *(name.as_posix() for name in files)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            content = contents[name] if name in contents else files[Path(name)].read_bytes()
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), content, zipfile.ZIP_DEFLATED)
