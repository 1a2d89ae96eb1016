"""What the driver says about its Ray while it waits: nodes lost and joined, resources that are not
there, a head or a raylet that stopped answering.

Ray's core ends the driver, with a stack dump or without a word, a minute after its head went away
and a quarter of a minute after the raylet of its own machine did. The monitor is earlier.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from engine.core import interrupts

EVERY = 3.0  # seconds between two checks
HEAD_LOST = 15.0  # seconds without an answer of the head on this machine
# Seconds that Ray's core waits for a head that is restarted (GCS fault tolerance), and how much
# sooner the monitor ends the run: a silence is noticed in steps of EVERY and _CONNECT.
RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"
_RECONNECT_DEFAULT = 60.0
_SOONER = 12.0
RAYLET_LOST = 5.0  # of this machine's raylet, which no network comes between
PATIENCE = 10.0  # seconds before a wait is reported
REPEAT = 60.0  # seconds between two reports of a wait
_CONNECT = 3.0  # seconds for one connection
_JOIN = 0.5  # seconds that closing waits for a look


@dataclass(frozen=True)
class View:
    """A cluster at one moment. nodes: the resources of each living node. free: what nobody uses, of
    all nodes together."""

    nodes: Mapping[str, Mapping[str, float]]
    free: Mapping[str, float]

    def total(self, resource: str) -> float:
        return sum(node.get(resource, 0.0) for node in self.nodes.values())


@dataclass(frozen=True)
class Endpoint:
    """A process that the driver cannot do without. lost_after: seconds without an answer."""

    name: str
    address: str
    lost_after: float


class Cluster(Protocol):
    """The monitored cluster."""

    endpoints: Sequence[Endpoint]

    def answers(self, endpoint: Endpoint) -> bool:
        """Whether it accepts a connection."""
        ...

    def view(self) -> View: ...


def head_lost_after(local: bool, reconnect: str) -> float:
    """Seconds without an answer after which the head is lost. A remote one may be restarted while
    Ray's core waits, and then the run goes on. reconnect: the value of `RECONNECT`."""
    if local:
        return HEAD_LOST
    seconds = _RECONNECT_DEFAULT
    with suppress(ValueError):
        seconds = float(reconnect)
    return max(HEAD_LOST, seconds - _SOONER)


class RayCluster:
    """The Ray that this process is connected to. reconnect: the value of `RECONNECT`."""

    def __init__(self, reconnect: str = "") -> None:
        import ray

        here = ray.get_runtime_context()
        head = str(here.gcs_address)
        self.endpoints = []
        local = False
        for node in ray.nodes():
            if node["NodeID"] == here.get_node_id():
                host = node["NodeManagerAddress"]
                local = head.rpartition(":")[0].strip("[]") in (host, "127.0.0.1", "::1")
                address = f"{host}:{node['NodeManagerPort']}"
                self.endpoints.append(Endpoint("this machine's raylet", address, RAYLET_LOST))
        self.endpoints.insert(0, Endpoint("the Ray head", head, head_lost_after(local, reconnect)))

    def answers(self, endpoint: Endpoint) -> bool:
        host, _, port = endpoint.address.rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), _CONNECT):
                return True
        except (ConnectionError, TimeoutError):
            return False
        except OSError as error:
            # Of a machine that is gone. All others (no descriptor left, no name server) are faults
            # of this machine.
            return error.errno != errno.EHOSTUNREACH

    def view(self) -> View:
        import ray

        nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        return View(nodes, ray.available_resources())


@dataclass
class Demand:
    """Resources that some work needs before it can start.

    each: of one worker. workers: how many must be placed at once. started: whether it runs already,
    as far as it can be seen from here.
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
    """What the cluster lacks for `demand`, in words; empty where it lacks nothing."""
    for resource in _RESOURCES:
        each = demand.each.get(resource, 0.0)
        if not each:
            continue
        needed = each * demand.workers
        total = view.total(resource)
        if needed > total:
            return f"{_count(needed, resource)}, the cluster has {total:g}"
        if sum(int(node.get(resource, 0.0) / each) for node in view.nodes.values()) < (
            demand.workers
        ):
            largest = max((node.get(resource, 0.0) for node in view.nodes.values()), default=0.0)
            return f"{_count(each, resource)} on one node, the largest node has {largest:g}"
    return ""


def _in_use(demand: Demand, view: View) -> str:
    """The resource that others use up, in words; empty where there is room."""
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
    """Watches `cluster` from two threads, for a look at it may block as long as Ray waits.

    say: prints a line. on_lost: called once, with a line, when an
    endpoint is lost.
    """

    cluster: Cluster
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
        """Returns once no thread asks Ray any more, or after half a second; at once in a job that
        was interrupted, whose Ray may not answer."""
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
        for endpoint in self.cluster.endpoints:
            if self.cluster.answers(endpoint):
                self._silent_since.pop(endpoint, None)
                continue
            since = self._silent_since.setdefault(endpoint, self.clock())
            if self.clock() - since >= endpoint.lost_after and not self._ended.is_set():
                self._ended.set()
                self.on_lost(
                    f"error: {endpoint.name} at {endpoint.address} stopped answering;"
                    " the same command continues from what is committed"
                )

    def check_cluster(self) -> None:
        """Report nodes that came and went, and what work waits for."""
        view = self.cluster.view()
        if self._silent_since or self._ended.is_set():
            return  # what a Ray says that is going away
        self._report_nodes(frozenset(view.nodes))
        for demand in list(self._demands):
            self._report_wait(demand, view)

    def _report_nodes(self, nodes: frozenset[str]) -> None:
        before, self._nodes = self._nodes, nodes
        if before is None or not nodes:
            return
        if lost := len(before - nodes):
            count = "a node was" if lost == 1 else f"{lost} nodes were"
            work = "its work is" if lost == 1 else "their work is"
            self.say(f"{count} lost: {len(nodes)} of {len(before)} remain; {work} given to others")
        if joined := len(nodes - before):
            count = "a node" if joined == 1 else f"{joined} nodes"
            self.say(f"{count} joined: {len(nodes)} now")

    def _report_wait(self, demand: Demand, view: View) -> None:
        lack = shortage(demand, view) or self._lacks_room(demand, view)
        if not lack:
            return
        now = self.clock()
        if now - demand.since < PATIENCE:
            return
        if demand.reported is None or now - demand.reported >= REPEAT:
            demand.reported = now
            self.say(f"waiting for {lack}")

    def _lacks_room(self, demand: Demand, view: View) -> str:
        """What others use up, as long as it cannot be this work that uses it."""
        if demand.placed:
            return ""
        demand.first_free = demand.first_free or view.free
        # Where resources changed hands, this work may be what took them.
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
            # A look fails while a head is away; whether it is lost is the other thread's concern.
            with suppress(Exception):
                tick()
            self._ended.wait(EVERY)
