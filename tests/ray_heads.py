"""A Ray cluster as an operator starts one: `ray start --head`, with a dashboard and a token."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.command_line import ROOT


@dataclass(frozen=True)
class RayHead:
    """
    Fields:
        address: of the dashboard. folder: where Ray keeps its sessions and logs. pid: of `ray start`.
    """

    address: str
    token: str
    folder: Path
    pid: int

    def processes(self) -> list[psutil.Process]:
        """All of the cluster's, with those of its jobs."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid == self.pid or str(self.folder) in " ".join(process.cmdline()):
                    found += [process, *process.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
        return list({process.pid: process for process in found}.values())

    def logged(self) -> dict[Path, str]:
        """Every log of the cluster."""
        logs = [path for path in self.folder.rglob("logs/**/*") if path.is_file()]
        return {path: path.read_text(errors="replace") for path in logs}


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def ray_head() -> Iterator[RayHead]:
    # Not pytest's folder: Ray puts sockets there, whose paths may have no more than 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    token = secrets.token_hex(16)
    gcs, dashboard, client, agent = _free_ports(4)
    options = {
        "port": gcs,
        "dashboard-port": dashboard,
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent,
        "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1",
        "num-cpus": 2,
        "num-gpus": 0,
        "object-store-memory": 300 << 20,
        "memory": 16 << 30,
        "temp-dir": folder,
    }
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    with (folder / "start.log").open("wb") as log:
        process = subprocess.Popen(
            [binaries / "ray", "start", "--head", "--block", *(f"--{k}={v}" for k, v in options.items())],
            env=environment,
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    head = RayHead(f"http://127.0.0.1:{dashboard}", token, folder, process.pid)
    try:
        _wait_until_up(head, process)
        yield head
    finally:
        for each in head.processes():
            each.kill()
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_up(head: RayHead, process: subprocess.Popen[bytes]) -> None:
    request = urllib.request.Request(
        f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"}
    )
    deadline = time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(request, timeout=5)
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            log = (head.folder / "start.log").read_text()
            assert process.poll() is None, f"ray start ended: {log}"
            assert time.monotonic() < deadline, f"no dashboard: {log}"
            time.sleep(0.5)
