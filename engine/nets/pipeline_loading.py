"""Loading of diffusers' pipelines and of their schedulers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import transformers

from engine.core.errors import StudyError, brief
from engine.core.paths import local_path
from engine.nets.pretrained import dtype_of

_PIPELINES: dict[str, Any] = {
    "text2image": diffusers.AutoPipelineForText2Image,
    "image2image": diffusers.AutoPipelineForImage2Image,
    "inpainting": diffusers.AutoPipelineForInpainting,
}
_SCHEDULERS: dict[str, Any] = {
    "ddim": diffusers.DDIMScheduler, "dpmsolver++": diffusers.DPMSolverMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler, "unipc": diffusers.UniPCMultistepScheduler,
}  # fmt: skip


def open_pipeline(spec: Any, folder: Path | None, mode: str) -> Any:
    """The pipeline of a folder, or of the checkpoint that the spec names. Raises `StudyError`."""
    fields: dict[str, Any] = {"torch_dtype": dtype_of(spec.precision), "use_safetensors": True}
    if folder is None:
        fields |= {"revision": spec.revision, "variant": spec.variant}
    if not spec.safety_checker:
        fields |= {"safety_checker": None, "requires_safety_checker": False}
    # Both warn at length about unused files; real problems raise.
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    source = str(folder or local_path(spec.model))
    try:
        pipeline = _PIPELINES[mode].from_pretrained(source, **fields)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise StudyError(f"generators: model: {spec.model}: {brief(error, 300)}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def scheduler_like(pipeline: Any, name: str) -> Any:
    """The named scheduler with the settings of the pipeline's own."""
    kind = _SCHEDULERS[name]
    if "FlowMatch" in type(pipeline.scheduler).__name__:
        kind = diffusers.FlowMatchEulerDiscreteScheduler
    return kind.from_config(pipeline.scheduler.config)
