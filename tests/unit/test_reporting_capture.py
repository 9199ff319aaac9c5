"""Chatter of every kind against the display, in a process of its own: on a pipe and on a pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

CHATTER = """
import logging, os, subprocess, sys, warnings
from pathlib import Path
from rlhf_ray.reporting.capture import capture_library_output
from rlhf_ray.reporting.progress import open_progress

early = logging.StreamHandler()  # a library's handler, made before the capture
logging.getLogger("library").addHandler(early)
with capture_library_output(Path(sys.argv[1])) as terminal:
    progress = open_progress(("sft", "reward"), terminal)
    progress.stage("sft", 2)
    print("chatter: print")
    print("chatter: stderr", file=sys.stderr)
    os.write(1, b"chatter: descriptor 1\\n")
    os.write(2, b"chatter: descriptor 2\\n")
    subprocess.run([sys.executable, "-c", "print('chatter: child')"], check=True)
    logging.getLogger("library").warning("chatter: logging")
    warnings.warn("chatter: warning")
    import tqdm
    list(tqdm.tqdm(range(3), desc="chatter: tqdm"))
    progress.step(2, {"sft/loss": 0.5})
    progress.close()
print("after: stdout")
print("after: stderr", file=sys.stderr)
assert "TQDM_DISABLE" not in os.environ
"""
KINDS = ("print", "stderr", "descriptor 1", "descriptor 2", "child", "logging", "warning")


def command(log: Path) -> list[str]:
    return [sys.executable, "-c", CHATTER, str(log)]


def assert_log_holds_the_chatter(log: Path) -> None:
    content = log.read_text()
    for kind in KINDS:
        assert f"chatter: {kind}" in content
    assert "tqdm" not in content
    assert re.search(r"\d WARNING library: chatter: logging", content)


def test_on_a_pipe(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "driver.log"
    found = subprocess.run(command(log), capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == [
        "sft: 2 steps",
        *[line for line in found.stdout.splitlines() if line.startswith("sft 2/2 | loss 0.500 | 0:0")],
        *[line for line in found.stdout.splitlines() if line.startswith("sft: done in 0:0")],
        "after: stdout",
    ]
    assert len(found.stdout.splitlines()) == 4
    assert found.stderr == "after: stderr\n"
    assert_log_holds_the_chatter(log)


def test_on_a_terminal_that_is_narrower_than_the_default(tmp_path: Path) -> None:
    log = tmp_path / "driver.log"
    log.write_text("an earlier run\n")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 33, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(
        command(log), stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    output = b""
    while chunk := _read(ours):
        output += chunk
    os.close(ours)
    assert process.wait() == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode())
    assert "chatter" not in plain
    assert "✓ sft     done in 0:0" in plain and "· reward  waiting" in plain
    assert "after: stdout" in plain and "after: stderr" in plain
    assert max(len(line) for line in re.split(r"[\r\n]+", plain)) < 33
    assert_log_holds_the_chatter(log)
    assert log.read_text().startswith("an earlier run\n")


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # Linux reports the closed other end of a pseudo-terminal as an input/output error
        return b""
