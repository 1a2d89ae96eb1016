"""The context of a plugin's `fit`: rank and world size, checkpoints, and the output of weights.

A fit does not depend on Ray. Every worker of one fit runs the same function; rank 0 writes.
Checkpoints are flattened safetensors and JSON in the store, so that any later attempt, on any
machine, continues from the newest complete one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from engine.core.errors import DamageError
from engine.core.manifest import Part, write_part
from engine.core.sealed import seal, unseal
from engine.core.store import Store
from engine.work.share import Share, within_process

if TYPE_CHECKING:
    from torch import Tensor

# Checkpoints kept per fit.
_KEEP = 2
# Folder of the sample images of a training.
SAMPLES = "samples"


@dataclass
class FitContext:
    """One worker's view of a fit.

    work: prefix in the store of checkpoints and progress, shared by all attempts at this fit.
    output: folder of the trained weights.
    inputs: digest of the fit's inputs; checkpoints of other inputs are ignored.
    attempt: name of this attempt; the result is published under it.
    """

    store: Store
    work: str
    output: str
    attempt: str
    inputs: str
    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    # CPU threads of this worker; None: the libraries' default.
    threads: int | None = None
    checkpoint_every: int = 500
    # Source of arrays that several fits read.
    share: Share = within_process
    on_report: Callable[[dict[str, Any]], None] | None = None
    # For one part of a larger fit: its name, the steps of earlier parts, and the steps of the
    # whole fit.
    name: str = ""
    before: int = 0
    whole: int | None = None

    def part(self, name: str, before: int, whole: int) -> FitContext:
        """The context of one of several trainings that make up this fit. It has checkpoints of its
        own. Its steps are counted from `before`, out of `whole`."""
        return replace(self, name=name, before=before, whole=whole)

    @property
    def _checkpoint_prefix(self) -> str:
        """Prefix of the checkpoints of this part, of all attempts."""
        return self.store.join(self.work, "parts", self.name) if self.name else self.work

    def report(self, done: int, total: int, **metrics: float) -> None:
        """Report progress and metrics. All ranks call it at the same step; only rank 0 writes."""
        if self.rank == 0:
            message = {
                "done": self.before + done, "total": self.whole or total, "metrics": metrics,
                "time": time.time(),
            }  # fmt: skip
            self.store.put(
                self.store.join(self.work, self.attempt, "progress.json"),
                json.dumps(message).encode(),
            )
        if self.on_report is not None:
            self.on_report({"done": self.before + done, **metrics})

    def save_sample(self, step: int, picture: bytes) -> None:
        """Keep a sample image (PNG) of the network at `step`; it is published with the weights."""
        if self.rank == 0:
            name = f"{self.name}-{step:08d}.png" if self.name else f"{step:08d}.png"
            self.store.put(self.store.join(self.work, SAMPLES, name), picture)

    def save_checkpoint(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint on rank 0 and delete all but the newest two."""
        if self.rank != 0:
            return
        from safetensors.torch import save

        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        name = f"checkpoint-{step:08d}.safetensors"
        key = self.store.join(self._checkpoint_prefix, self.attempt, name)
        # Data first, then the record: a new attempt may write the same step again.
        self.store.put(key, data)
        record = {
            "step": step,
            "data": key,
            "sha256": hashlib.sha256(data).hexdigest(),
            "state": state,
            "inputs": self.inputs,
        }  # fmt: skip
        self.store.put(key.removesuffix("safetensors") + "json", seal(record))
        for _, old in self._own_records()[:-_KEEP]:
            self.store.delete(old)
            self.store.delete(old.removesuffix("json") + "safetensors")

    def latest_checkpoint(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """Step, tensors and state of the newest complete checkpoint of any attempt, or None."""
        from safetensors.torch import load

        for _, key in reversed(self._records()):
            try:
                record = unseal(self.store.read(key))
                data = self.store.read(record["data"])
            except (ValueError, KeyError, FileNotFoundError):
                continue  # damaged, or deleted by another attempt meanwhile
            if (
                record.get("inputs") == self.inputs
                and hashlib.sha256(data).hexdigest() == record["sha256"]
            ):
                return int(record["step"]), load(data), record["state"]
        return None

    def publish(self, folder: Path, metrics: dict[str, Any]) -> None:
        """Hand the trained weights (all files below `folder`) and the metrics to the step that
        started the fit."""
        if self.rank != 0:
            return
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes
            for path in folder.rglob("*")
            if path.is_file()
        }
        for key in self.store.listing(self.store.join(self.work, SAMPLES)):
            read = functools.partial(self.store.read, key)
            files[self.store.join(SAMPLES, key.rpartition("/")[2])] = read
        parts = []
        for relative in sorted(files):
            path = PurePosixPath(relative)
            part = write_part(
                self.store, self.store.join(self.output, *path.parts[:-1]), path.stem,
                path.suffix.removeprefix(".") or "bin", files[relative](), tags={"file": relative},
            )  # fmt: skip
            parts.append(part.model_dump())
        self.store.put(
            self.store.join(self.work, self.attempt, "result.json"),
            seal({"parts": parts, "metrics": metrics}),
        )

    def _own_records(self) -> list[tuple[str, str]]:
        """Records of checkpoints of this fit's inputs. Those of other inputs must be kept."""
        records = []
        for name, key in self._records():
            try:
                if unseal(self.store.read(key)).get("inputs") == self.inputs:
                    records.append((name, key))
            except (ValueError, FileNotFoundError):
                continue
        return records

    def _records(self) -> list[tuple[str, str]]:
        keys = checkpoint_records(self.store, self._checkpoint_prefix)
        return sorted(
            (key.rpartition("/")[2], key) for key in keys if self.name or "/parts/" not in key
        )


def checkpoint_records(store: Store, prefix: str) -> list[str]:
    """Keys of the records of all checkpoints below `prefix`."""
    keys = store.listing(prefix)
    return [key for key in keys if key.endswith(".json") and "/checkpoint-" in key]


def checkpoint_problem(store: Store, key: str) -> str:
    """The problem of the checkpoint with the record `key`; empty if it is intact."""
    try:
        record = unseal(store.read(key))
        if store.sha256(record["data"]) != record["sha256"]:
            return "its data does not match its digest"
    except FileNotFoundError:
        # Records are deleted before their data.
        return "its data is missing" if store.exists(key) else ""
    except (ValueError, KeyError):
        return "is damaged or not of this version"
    return ""


@dataclass(frozen=True)
class FitProgress:
    """The last message of `FitContext.report`."""

    done: int
    total: int
    metrics: dict[str, float]


def read_progress(store: Store, work: str, attempt: str) -> FitProgress | None:
    try:
        message = json.loads(store.read(store.join(work, attempt, "progress.json")))
    except (FileNotFoundError, ValueError):
        return None
    return FitProgress(message["done"], message["total"], message["metrics"])


def read_result(store: Store, work: str, attempt: str) -> tuple[list[Part], dict[str, Any]]:
    """The published parts and metrics of a fit. Raises `FileNotFoundError` if the fit has not
    ended."""
    key = store.join(work, attempt, "result.json")
    try:
        result = unseal(store.read(key))
    except ValueError as error:
        raise DamageError(f"{store.location(key)} is damaged ({error})", key) from error
    return [Part.model_validate(part) for part in result["parts"]], result["metrics"]
