"""A Ray cluster of several nodes on loopback, of its own: started, looked into, and ended by its
processes' ids."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

RAY = Path(sys.executable).parent / "ray"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Cluster:
    """A head and other nodes, each with one CPU."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    address: str = ""

    def start(self, *more: str) -> None:
        command = [
            str(RAY), "start", "--num-cpus=1", "--node-ip-address=127.0.0.1",
            "--object-store-memory=200000000", f"--dashboard-agent-listen-port={free_port()}",
        ]  # fmt: skip
        done = subprocess.run(
            [*command, *more], env=self.environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def processes(self, name: str) -> list[psutil.Process]:
        """Processes of all nodes with `name` in their command line, the oldest first."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                text = " ".join(process.cmdline())
                if str(self.folder) in text and name in text:
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def add_node(self) -> None:
        self.start(f"--address={self.address}")

    def workers(self) -> list[psutil.Process]:
        """Members of a pool of actors."""
        return [
            process
            for raylet in self.processes("raylet/raylet")
            for process in raylet.children()
            if "MapWorker" in " ".join(process.cmdline())
        ]

    def close(self) -> None:
        found = self.processes("")
        for process in list(found):
            with suppress(psutil.Error):
                found += process.children(recursive=True)
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=5)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def loopback_cluster(nodes: int) -> Iterator[Cluster]:
    """A cluster of so many nodes, the first of them the head."""
    # Short, because Ray creates sockets in it.
    made = Cluster(Path(tempfile.mkdtemp(prefix="rl-", dir="/tmp")))
    token = made.folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    made.environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    port = free_port()
    made.address = f"127.0.0.1:{port}"
    try:
        made.start(
            "--head", f"--port={port}", "--include-dashboard=false",
            f"--ray-client-server-port={free_port()}", f"--temp-dir={made.folder}",
        )  # fmt: skip
        for _ in range(nodes - 1):
            made.add_node()
        yield made
    finally:
        made.close()
