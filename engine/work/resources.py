"""What a profile grants: no part of any identity."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from engine.core.spec import Spec
from engine.work.stage import Offload


class StageResources(Spec):
    """One pool of actors. `batch_size` is the micro-batch; pixels of generated images may depend on
    it."""

    actors: Annotated[int, Field(ge=1)] = 1
    cpus: Annotated[float, Field(gt=0)] = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 32
    # Threads of each stage that decodes or encodes.
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    shards_per_call: Annotated[int, Field(ge=1, le=64)] = 8
    # Of a pipeline of several networks, for GPUs that cannot hold all: model keeps the one that
    # computes on the GPU, sequential only the layer that does (far slower).
    offload: Offload = "none"
    # A worker that does not come back is ended after hang_multiple times the seconds that its
    # micro-batches would take at the slowest pace so far, and not before hang_floor seconds. Until
    # a first micro-batch was finished, and while rows are read or stored, after hang_first seconds.
    hang_multiple: Annotated[float, Field(ge=2)] = 20.0
    hang_floor: Annotated[float, Field(gt=0, le=1e6)] = 60.0
    hang_first: Annotated[float, Field(gt=0, le=1e6)] = 3600.0


class TrialResources(Spec):
    """One trial of a search: a process that trains one small model after another, or, with more
    workers than one, a process that has Ray Train's workers train one after another."""

    # Of one classifier. cpus, threads and gpus are of each; a run without Ray has one.
    workers: Annotated[int, Field(ge=1)] = 1
    # Logical CPUs that it holds: they bound how many trials run at once.
    cpus: Annotated[float, Field(gt=0)] = 1.0
    # CPU threads of its fit.
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0.0
    # How often a trial whose process, or one of whose workers, died is tried again before the run
    # stops.
    max_failures: Annotated[int, Field(ge=0)] = 3
    # Trials on several workers, and settings of a tuning that generate images, that run at once:
    # their streams and fits share the CPUs and GPUs, and on a small machine two would wait for each
    # other for ever.
    drivers: Annotated[int, Field(ge=1, le=1000)] = 1


class FitResources(Spec):
    workers: Annotated[int, Field(ge=1)] = 1
    cpus: Annotated[float, Field(gt=0)] = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0
    # How often a lost worker is replaced before the run stops.
    max_failures: Annotated[int, Field(ge=0)] = 3
    # Optimizer steps between two checkpoints: what a kill can cost.
    checkpoint_every: Annotated[int, Field(ge=1)] = 500
