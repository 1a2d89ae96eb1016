"""Messages of the monitor about a fake Ray cluster."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from engine.runtime.monitor import (
    HEAD_LOST,
    PATIENCE,
    RAYLET_LOST,
    REPEAT,
    Demand,
    Endpoint,
    Monitor,
    RayCluster,
    View,
    head_lost_after,
    shortage,
)

HEAD = Endpoint("the Ray head", "10.0.0.1:6379", HEAD_LOST)
RAYLET = Endpoint("this machine's raylet", "10.0.0.1:7000", RAYLET_LOST)


@dataclass
class FakeCluster:
    """Two nodes of 2 CPUs, one with a GPU."""

    nodes: dict[str, dict[str, float]] = field(
        default_factory=lambda: {"a": {"CPU": 2.0, "GPU": 1.0}, "b": {"CPU": 2.0}}
    )
    free: dict[str, float] = field(default_factory=lambda: {"CPU": 4.0, "GPU": 1.0})
    silent: set[Endpoint] = field(default_factory=set)
    endpoints: Sequence[Endpoint] = (HEAD, RAYLET)

    def answers(self, endpoint: Endpoint) -> bool:
        return endpoint not in self.silent

    def view(self) -> View:
        return View(dict(self.nodes), dict(self.free))


class Watched:
    """A monitor with its clock and its messages."""

    def __init__(self) -> None:
        self.ray_cluster, self.now = FakeCluster(), 0.0
        self.lines: list[str] = []
        self.lost: list[str] = []
        self.monitor = Monitor(
            self.ray_cluster, self.lines.append, self.lost.append, clock=lambda: self.now
        )

    def after(self, seconds: float) -> list[str]:
        """The messages of a check after so many seconds."""
        self.now += seconds
        before = len(self.lines)
        self.monitor.check_endpoints()
        self.monitor.check_cluster()
        return self.lines[before:]


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_lost_and_joined_nodes_are_reported_once(watched: Watched) -> None:
    assert watched.after(0) == []
    gone = watched.ray_cluster.nodes.pop("b")
    assert watched.after(3) == [
        "lost 1 node of the Ray cluster: 1 of 2 remain and take over the work"
    ]  # fmt: skip
    assert watched.after(3) == []
    watched.ray_cluster.nodes.update(c=gone, d=gone)
    assert watched.after(3) == ["2 nodes joined the Ray cluster: 3 now"]


def test_missing_resources_are_waited_for(watched: Watched) -> None:
    with watched.monitor.waiting(Demand({"CPU": 5.0, "GPU": 0.0})):
        assert watched.after(0) == []
        assert watched.after(PATIENCE) == ["waiting for 5 CPUs; the Ray cluster has 4"]
        assert watched.after(3) == []
        assert watched.after(REPEAT) == ["waiting for 5 CPUs; the Ray cluster has 4"]
        watched.ray_cluster.nodes["c"] = {"CPU": 8.0}
        watched.ray_cluster.free["CPU"] = 12.0
        assert watched.after(REPEAT) == ["1 node joined the Ray cluster: 3 now"]
    watched.ray_cluster.nodes.clear()
    assert watched.after(REPEAT) == []


@pytest.mark.parametrize(
    ("demand", "lack"),
    [
        (Demand({"CPU": 2.0}, workers=2), ""),
        (Demand({"CPU": 1.5}, workers=3), "4.5 CPUs; the Ray cluster has 4"),
        (
            Demand({"CPU": 3.0}),
            "3 CPUs on one node; the largest node has 2 (add a larger one, or lower cpus in the"
            " profile)",
        ),
        (Demand({"CPU": 1.0, "GPU": 1.0}, workers=2), "2 GPUs; the Ray cluster has 1"),
        (Demand({"CPU": 1.0, "GPU": 0.25}, workers=4), ""),
    ],
)
def test_shortage_is_what_can_never_be_placed(demand: Demand, lack: str) -> None:
    assert shortage(demand, FakeCluster().view()) == lack


def test_resources_in_use_are_waited_for_until_they_are_released(watched: Watched) -> None:
    watched.ray_cluster.free["GPU"] = 0.0
    with watched.monitor.waiting(Demand({"CPU": 1.0, "GPU": 1.0})):
        watched.after(0)
        assert watched.after(PATIENCE) == ["waiting for 1 GPU: all 1 are in use"]
        watched.ray_cluster.free["GPU"] = 1.0
        watched.after(3)
        # Now used by this work.
        watched.ray_cluster.free["GPU"] = 0.0
        assert watched.after(REPEAT) == []


def test_work_that_reports_is_not_waiting(watched: Watched) -> None:
    watched.ray_cluster.free["CPU"] = 1.0
    with watched.monitor.waiting(Demand({"CPU": 2.0}, started=lambda: watched.now > 20)):
        watched.after(0)
        assert watched.after(PATIENCE) == ["waiting for 2 CPUs: 3 of 4 are in use"]
        assert watched.after(REPEAT) == []


@pytest.mark.parametrize("endpoint", [HEAD, RAYLET])
def test_silent_endpoint_is_lost_once(watched: Watched, endpoint: Endpoint) -> None:
    watched.ray_cluster.silent = {endpoint}
    watched.after(0)
    watched.after(endpoint.lost_after - 0.1)
    # It came back in time.
    watched.ray_cluster.silent = set()
    watched.after(0.05)
    watched.ray_cluster.silent = {endpoint}
    watched.after(0)
    watched.after(endpoint.lost_after - 0.1)
    assert watched.lost == []
    watched.after(0.2)
    watched.after(100)
    assert watched.lost == [
        f"error: {endpoint.name} at {endpoint.address} stopped answering;"
        " run the same command again to continue from the committed results"
    ]


def test_lost_head_does_not_report_lost_nodes(watched: Watched) -> None:
    watched.after(0)
    watched.ray_cluster.silent = {HEAD}
    watched.ray_cluster.nodes.clear()
    assert watched.after(3) == []


def test_endpoint_answers_while_something_listens() -> None:
    ray_cluster = object.__new__(RayCluster)
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = Endpoint("the Ray head", f"127.0.0.1:{server.getsockname()[1]}", 1.0)
        assert ray_cluster.answers(there)
    assert not ray_cluster.answers(there)


@pytest.mark.parametrize(
    ("error", "answers"),
    [
        (ConnectionRefusedError(), False),
        (TimeoutError(), False),
        (OSError(errno.EHOSTUNREACH, "no route to host"), False),
        (OSError(errno.EMFILE, "too many open files"), True),
        (socket.gaierror("temporary failure in name resolution"), True),
    ],
)
def test_local_fault_is_not_a_silent_head(
    error: OSError, answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(socket, "create_connection", fail)
    assert object.__new__(RayCluster).answers(HEAD) is answers


def test_remote_head_may_restart_as_long_as_ray_waits() -> None:
    assert head_lost_after(True, "600") == HEAD_LOST
    assert head_lost_after(False, "") == 48.0
    assert head_lost_after(False, "600") == 588.0
    assert head_lost_after(False, "5") == HEAD_LOST


def test_closed_monitor_stops_polling() -> None:
    asked, go_on = threading.Event(), threading.Event()

    class Slow(FakeCluster):
        def view(self) -> View:
            asked.set()
            assert go_on.wait(timeout=60)
            return super().view()

    monitor = Monitor(Slow(), print, print)
    monitor.start()
    assert asked.wait(timeout=60)
    threading.Timer(0.1, go_on.set).start()
    monitor.close()
    assert not [t.name for t in threading.enumerate() if t.name.startswith("monitor-")]
