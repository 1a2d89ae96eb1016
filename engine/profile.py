"""The profile: where and how a study is computed. It is part of no key."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from engine.core.spec import Spec, explained
from engine.work.resources import FitResources, StageResources, TrialResources

StageName = Literal["default", "decode", "embed", "generate", "classify"]
_ON_ACCELERATOR = ("embed", "generate", "classify")


class Profile(Spec):
    """Where and how to compute; part of no key."""

    storage: str = "runs"
    # ray: steps run on Ray. inline: in this process, for tests and debugging.
    runtime: Literal["ray", "inline"] = "ray"
    # local: a private Ray for this run. auto: the cluster that this job was submitted to.
    address: str = "local"
    # Logical CPUs of a local Ray; None: as many as the machine has, at least 4.
    num_cpus: Annotated[int, Field(ge=1)] | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    # Resources by stage; `default` applies to stages that are not listed.
    stages: dict[StageName, StageResources] = {
        "decode": StageResources(actors=2, cpus=0.5, batch_size=64),
        "embed": StageResources(cpus=2, batch_size=64),
        "generate": StageResources(cpus=2, batch_size=32),
    }
    fit: FitResources = FitResources(cpus=2, checkpoint_every=100)
    # Resources of one trial of a search; as many trials run at once as fit.
    trial: TrialResources = TrialResources(cpus=2)
    # Where runs are logged: an MLflow server's URI. auto: an SQLite file in local storage. none.
    mlflow: str = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> Profile:
        gpus = {f"stages.{name}": stage.gpus for name, stage in self.stages.items()}
        gpus |= {"fit": self.fit.gpus, "trial": self.trial.gpus}
        if self.device == "cpu" and (with_gpu := [name for name, count in gpus.items() if count]):
            raise explained(
                "{place}.gpus asks for a GPU, but device is cpu; set device: cuda",
                place=with_gpu[0],
            )
        for place, resources in (("fit", self.fit), ("trial", self.trial)):
            if resources.workers > 1 and 0 < resources.gpus < 1:
                raise explained(
                    "{place}.gpus: NCCL cannot connect two workers on one GPU; set it to 1, or"
                    " {place}.workers to 1",
                    place=place,
                )
        offloads = [name for name, stage in self.stages.items() if stage.offload != "none"]
        if self.device == "cpu" and offloads:
            raise explained(
                "stages.{name}.offload saves GPU memory, but device is cpu; remove it",
                name=offloads[0],
            )
        if self.device == "cuda" and self.runtime == "ray":
            # Ray hides GPUs from workers that request none, and two trials on one GPU run out of
            # memory.
            gpus |= {f"stages.{name}": self.stage(name).gpus for name in _ON_ACCELERATOR}
            for place, count in gpus.items():
                if not count and place not in ("stages.decode", "stages.default"):
                    raise explained("device: cuda needs {place}.gpus above 0", place=place)
        relative = "://" not in self.storage and not self.storage.startswith(("/", "~", "$"))
        if self.address != "local" and relative:
            raise explained(
                "storage: {storage} is relative to the job's own folder; use a URL or an absolute"
                " path",
                storage=self.storage,
            )
        return self

    def stage(self, name: str) -> StageResources:
        """Resources of a stage: its own entry, else `default`, else the built-in defaults."""
        by_name = {str(key): resources for key, resources in self.stages.items()}
        return by_name.get(name) or by_name.get("default") or StageResources()
