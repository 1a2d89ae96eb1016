"""What a plugin's `fit` is given: its place among the workers, checkpoints, and where weights go.

A fit knows nothing of Ray. Every worker of one fit runs the same function; rank 0 writes.
Checkpoints are flattened safetensors and JSON in the store, so that any later attempt, on any
machine, adopts the newest complete one.
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

_KEEP = 2
# Folder of the pictures that a training shows of itself.
SAMPLES = "looks"


@dataclass
class FitContext:
    """One worker's view of a fit.

    work: prefix in the store of checkpoints and progress, shared by all attempts at this fit.
    output: folder of the trained weights.
    inputs: digest of what the fit reads; a checkpoint of other inputs is not adopted.
    attempt: names this attempt; the result is published under it.
    """

    store: Store
    work: str
    output: str
    attempt: str
    inputs: str
    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    # CPU threads of this worker; None: as many as its libraries take.
    threads: int | None = None
    checkpoint_every: int = 500
    # Where fits find arrays that others read too.
    share: Share = within_process
    on_report: Callable[[dict[str, Any]], None] | None = None
    # Of a part of a larger fit: its name, the steps before it and those of the whole.
    name: str = ""
    before: int = 0
    whole: int | None = None

    def part(self, name: str, before: int, whole: int) -> FitContext:
        """The context of one training of several that make up this fit: its checkpoints are its
        own, its steps are counted after the `before` ones of earlier parts, `whole` in all."""
        return replace(self, name=name, before=before, whole=whole)

    @property
    def _place(self) -> str:
        """Prefix of the checkpoints of this part, whatever the attempt."""
        return self.store.join(self.work, "parts", self.name) if self.name else self.work

    def report(self, done: int, total: int, **metrics: float) -> None:
        """Tell how far the fit is. All ranks call it at the same step; rank 0 is heard."""
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

    def show(self, step: int, picture: bytes) -> None:
        """Keep a picture (PNG) of what has been learnt by `step`; it is published with the
        weights."""
        if self.rank == 0:
            name = f"{self.name}-{step:08d}.png" if self.name else f"{step:08d}.png"
            self.store.put(self.store.join(self.work, SAMPLES, name), picture)

    def save_checkpoint(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint of rank 0 and drop all but the newest two."""
        if self.rank != 0:
            return
        from safetensors.torch import save

        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        key = self.store.join(self._place, self.attempt, f"checkpoint-{step:08d}.safetensors")
        # A new attempt may pass the same step again: data first, then the record that vouches for
        # it.
        self.store.put(key, data)
        record = {
            "step": step,
            "data": key,
            "sha256": hashlib.sha256(data).hexdigest(),
            "state": state,
            "inputs": self.inputs,
        }  # fmt: skip
        self.store.put(key.removesuffix("safetensors") + "json", seal(record))
        for _, old in self._mine()[:-_KEEP]:
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
                continue  # damaged, or pruned by another attempt meanwhile
            if (
                record.get("inputs") == self.inputs
                and hashlib.sha256(data).hexdigest() == record["sha256"]
            ):
                return int(record["step"]), load(data), record["state"]
        return None

    def publish(self, folder: Path, metrics: dict[str, Any]) -> None:
        """Hand the trained weights (all files below `folder`) and figures to the step that asked
        for the fit."""
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

    def _mine(self) -> list[tuple[str, str]]:
        """Checkpoints of this fit's inputs; those of others are not ours to drop, nor count."""
        found = []
        for name, key in self._records():
            try:
                if unseal(self.store.read(key)).get("inputs") == self.inputs:
                    found.append((name, key))
            except (ValueError, FileNotFoundError):
                continue
        return found

    def _records(self) -> list[tuple[str, str]]:
        keys = checkpoint_records(self.store, self._place)
        return sorted(
            (key.rpartition("/")[2], key) for key in keys if self.name or "/parts/" not in key
        )


def checkpoint_records(store: Store, prefix: str) -> list[str]:
    """Keys of the records of all checkpoints below `prefix`."""
    keys = store.listing(prefix)
    return [key for key in keys if key.endswith(".json") and "/checkpoint-" in key]


def checkpoint_problem(store: Store, key: str) -> str:
    """What is wrong with a checkpoint, by the key of its record; empty where nothing is."""
    try:
        record = unseal(store.read(key))
        if store.sha256(record["data"]) != record["sha256"]:
            return "its data does not match its digest"
    except FileNotFoundError:
        # Records are dropped before their data.
        return "its data is missing" if store.exists(key) else ""
    except (ValueError, KeyError):
        return "is damaged or not of this version"
    return ""


@dataclass(frozen=True)
class FitProgress:
    """What `report` last said."""

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
    """Parts and metrics that `publish` left. Raises `FileNotFoundError` where the fit did not
    end."""
    key = store.join(work, attempt, "result.json")
    try:
        result = unseal(store.read(key))
    except ValueError as error:
        raise DamageError(f"{store.location(key)} is damaged ({error})", key) from error
    return [Part.model_validate(part) for part in result["parts"]], result["metrics"]
