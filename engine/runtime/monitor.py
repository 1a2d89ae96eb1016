"""Monitors the Ray cluster of a driver and reports lost and joined nodes, missing resources, and a
head or raylet that stopped answering.

Ray's core ends the driver, with a stack dump or silently, a minute after the loss of the head and
15 seconds after the loss of the raylet on its own machine. The monitor reports it earlier.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from engine.core import interrupts

EVERY = 3.0  # seconds between two checks
HEAD_LOST = 15.0  # seconds without an answer from the head on this machine
# Environment variable and default of the seconds that Ray's core waits for a restarted head (GCS
# fault tolerance), and how much earlier the monitor ends the run. Silence is detected in steps of
# EVERY and _CONNECT.
RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"
_RECONNECT_DEFAULT = 60.0
_MARGIN = 12.0
RAYLET_LOST = 5.0  # seconds without an answer from this machine's raylet; no network is involved
PATIENCE = 10.0  # seconds before a wait is reported
REPEAT = 60.0  # seconds between two reports of a wait
_CONNECT = 3.0  # seconds for one connection
_JOIN = 0.5  # seconds that `close` waits for a check to end


@dataclass(frozen=True)
class View:
    """A Ray cluster at one moment. nodes: resources of each living node. free: unused resources of
    all nodes together."""

    nodes: Mapping[str, Mapping[str, float]]
    free: Mapping[str, float]

    def total(self, resource: str) -> float:
        return sum(node.get(resource, 0.0) for node in self.nodes.values())


@dataclass(frozen=True)
class Endpoint:
    """A process that the driver depends on. lost_after: seconds without an answer."""

    name: str
    address: str
    lost_after: float


def head_lost_after(local: bool, reconnect: str) -> float:
    """Seconds without an answer after which the head counts as lost. A remote head may be restarted
    while Ray's core waits, and then the run continues. reconnect: the value of `RECONNECT`."""
    if local:
        return HEAD_LOST
    seconds = _RECONNECT_DEFAULT
    with suppress(ValueError):
        seconds = float(reconnect)
    return max(HEAD_LOST, seconds - _MARGIN)


class RayCluster:
    """The Ray cluster that this process is connected to. reconnect: the value of `RECONNECT`."""

    def __init__(self, reconnect: str = "") -> None:
        import ray

        here = ray.get_runtime_context()
        head = str(here.gcs_address)
        self.endpoints: list[Endpoint] = []
        local = False
        for node in ray.nodes():
            if node["NodeID"] == here.get_node_id():
                host = node["NodeManagerAddress"]
                local = head.rpartition(":")[0].strip("[]") in (host, "127.0.0.1", "::1")
                address = f"{host}:{node['NodeManagerPort']}"
                self.endpoints.append(Endpoint("this machine's raylet", address, RAYLET_LOST))
        self.endpoints.insert(0, Endpoint("the Ray head", head, head_lost_after(local, reconnect)))

    def answers(self, endpoint: Endpoint) -> bool:
        """Whether the endpoint accepts a connection."""
        host, _, port = endpoint.address.rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), _CONNECT):
                return True
        except (ConnectionError, TimeoutError):
            return False
        except OSError as error:
            # EHOSTUNREACH means that the remote machine is gone. Any other error (no descriptors
            # left, no name server) is a fault of this machine.
            return error.errno != errno.EHOSTUNREACH

    def view(self) -> View:
        import ray

        nodes = ray.nodes()
        free = ray.available_resources()
        return View({node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}, free)


@dataclass
class Demand:
    """Resources that some work needs before it can start.

    each: of one worker. workers: number of workers to place at once. started: whether the work is
    known to run.
    """

    each: Mapping[str, float]
    workers: int = 1
    started: Callable[[], bool] = lambda: False
    since: float = 0.0
    reported: float | None = None
    first_free: Mapping[str, float] | None = None
    placed: bool = False


_RESOURCES = ("CPU", "GPU")


def shortage(demand: Demand, view: View) -> str:
    """The resources that the Ray cluster lacks for `demand`, as text; empty if there are enough."""
    for resource in _RESOURCES:
        each = demand.each.get(resource, 0.0)
        if not each:
            continue
        needed = each * demand.workers
        total = view.total(resource)
        if needed > total:
            return f"{_count(needed, resource)}; the Ray cluster has {total:g}"
        if sum(int(node.get(resource, 0.0) / each) for node in view.nodes.values()) < (
            demand.workers
        ):
            largest = max((node.get(resource, 0.0) for node in view.nodes.values()), default=0.0)
            return (
                f"{_count(each, resource)} on one node; the largest node has {largest:g} (add a"
                f" larger one, or lower {resource.lower()}s in the profile)"
            )
    return ""


def _in_use(demand: Demand, view: View) -> str:
    """The resource that is in use by others, as text; empty if enough is free."""
    for resource in _RESOURCES:
        needed = demand.each.get(resource, 0.0) * demand.workers
        if needed > view.free.get(resource, 0.0) + 1e-6:
            free, total = view.free.get(resource, 0.0), view.total(resource)
            used = f"all {total:g} are" if not free else f"{total - free:g} of {total:g} are"
            return f"{_count(needed, resource)}: {used} in use"
    return ""


def _count(number: float, name: str) -> str:
    return f"{number:g} {name}" if number <= 1 else f"{number:g} {name}s"


@dataclass
class Monitor:
    """Checks `ray_cluster` from two threads, because a view of it may block as long as Ray waits.

    say: prints a line. on_lost: called once, with a line, when an endpoint is lost.
    """

    ray_cluster: RayCluster
    say: Callable[[str], None]
    on_lost: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    _demands: list[Demand] = field(default_factory=list)
    _nodes: frozenset[str] | None = None
    _silent_since: dict[Endpoint, float] = field(default_factory=dict)
    _ended: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        for name, tick in (
            ("endpoints", self.check_endpoints),
            ("cluster", self.check_cluster),
        ):
            thread = threading.Thread(
                target=self._repeat, args=(tick,), daemon=True, name=f"monitor-{name}"
            )
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Stop the threads; returns once none uses Ray, or after half a second. In an interrupted
        job, whose Ray may not answer, it returns at once."""
        self._ended.set()
        if interrupts.received():
            return
        ends = time.monotonic() + _JOIN
        for thread in self._threads:
            thread.join(max(0.0, ends - time.monotonic()))

    @contextmanager
    def waiting(self, demand: Demand) -> Iterator[Demand]:
        """While `demand` has not started, report what it waits for."""
        demand.since = self.clock()
        self._demands.append(demand)
        try:
            yield demand
        finally:
            self._demands.remove(demand)

    def check_endpoints(self) -> None:
        """Report an endpoint that has been silent for too long."""
        for endpoint in self.ray_cluster.endpoints:
            if self.ray_cluster.answers(endpoint):
                self._silent_since.pop(endpoint, None)
                continue
            since = self._silent_since.setdefault(endpoint, self.clock())
            if self.clock() - since >= endpoint.lost_after and not self._ended.is_set():
                self._ended.set()
                self.on_lost(
                    f"error: {endpoint.name} at {endpoint.address} stopped answering;"
                    " run the same command again to continue from the committed results"
                )

    def check_cluster(self) -> None:
        """Report lost and joined nodes, and the resources that work waits for."""
        view = self.ray_cluster.view()
        if self._silent_since or self._ended.is_set():
            return  # a Ray that is shutting down gives wrong answers
        self._report_nodes(frozenset(view.nodes))
        for demand in list(self._demands):
            self._report_wait(demand, view)

    def _report_nodes(self, nodes: frozenset[str]) -> None:
        before, self._nodes = self._nodes, nodes
        if before is None or not nodes:
            return
        if lost := len(before - nodes):
            count = "1 node" if lost == 1 else f"{lost} nodes"
            self.say(
                f"lost {count} of the Ray cluster: {len(nodes)} of {len(before)} remain and take"
                " over the work"
            )
        if joined := len(nodes - before):
            count = "1 node" if joined == 1 else f"{joined} nodes"
            self.say(f"{count} joined the Ray cluster: {len(nodes)} now")

    def _report_wait(self, demand: Demand, view: View) -> None:
        lack = shortage(demand, view) or self._lacks_room(demand, view)
        if not lack:
            return
        now = self.clock()
        repeats = demand.reported is None or now - demand.reported >= REPEAT
        if repeats and now - demand.since >= PATIENCE:
            demand.reported = now
            self.say(f"waiting for {lack}")

    def _lacks_room(self, demand: Demand, view: View) -> str:
        """The resource in use by others, as text; empty once this work may be the user."""
        if demand.placed:
            return ""
        demand.first_free = demand.first_free or view.free
        # If free resources changed, this work may have taken them.
        moved = any(
            abs(view.free.get(name, 0.0) - demand.first_free.get(name, 0.0)) > 1e-6
            for name in _RESOURCES
            if demand.each.get(name)
        )
        lack = _in_use(demand, view)
        demand.placed = not lack or moved or demand.started()
        return "" if demand.placed else lack

    def _repeat(self, tick: Callable[[], None]) -> None:
        while not self._ended.is_set():
            # A check fails while the head is away; the other thread decides whether it is lost.
            with suppress(Exception):
                tick()
            self._ended.wait(EVERY)
