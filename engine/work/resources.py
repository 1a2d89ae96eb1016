"""CPUs, GPUs and limits that a profile grants. They are not part of any identity."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from engine.core.spec import Spec
from engine.work.stage import Offload


class StageResources(Spec):
    """One pool of actors. batch_size: of a micro-batch; pixels of generated images may depend on
    it."""

    actors: Annotated[int, Field(ge=1)] = 1
    cpus: Annotated[float, Field(gt=0)] = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 32
    # Threads of each decoding or encoding stage.
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    shards_per_call: Annotated[int, Field(ge=1, le=64)] = 8
    # For a pipeline of several networks on a GPU that cannot hold all: `model` keeps only the
    # active network on the GPU, `sequential` only the active layer (far slower).
    offload: Offload = "none"
    # A hanging worker is ended after hang_multiple times the seconds that its micro-batches would
    # take at the slowest pace so far, but not before hang_floor seconds. Before the first
    # micro-batch, and while rows are read or stored, the limit is hang_first seconds.
    hang_multiple: Annotated[float, Field(ge=2)] = 20.0
    hang_floor: Annotated[float, Field(gt=0, le=1e6)] = 60.0
    hang_first: Annotated[float, Field(gt=0, le=1e6)] = 3600.0


class TrialResources(Spec):
    """One trial of a search: a process that trains one small model after the other. With more than
    one worker, the process trains each model on Ray Train workers."""

    # Workers per classifier. cpus, threads and gpus are per worker; without Ray there is one.
    workers: Annotated[int, Field(ge=1)] = 1
    # Logical CPUs that it reserves: they bound how many trials run at once.
    cpus: Annotated[float, Field(gt=0)] = 1.0
    # CPU threads of its fit.
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0.0
    # Retries of a trial whose process or worker died, before the run stops.
    max_failures: Annotated[int, Field(ge=0)] = 3
    # Concurrent trials on several workers, and concurrent settings of a tuning that generate
    # images. Their streams and fits share the CPUs and GPUs; on a small machine two could deadlock.
    drivers: Annotated[int, Field(ge=1, le=1000)] = 1


class FitResources(Spec):
    workers: Annotated[int, Field(ge=1)] = 1
    cpus: Annotated[float, Field(gt=0)] = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0
    # Replacements of lost workers before the run stops.
    max_failures: Annotated[int, Field(ge=0)] = 3
    # Optimizer steps between two checkpoints: the most that a kill can cost.
    checkpoint_every: Annotated[int, Field(ge=1)] = 500
