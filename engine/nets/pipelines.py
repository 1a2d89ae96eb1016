"""Checkpoints of diffusers' pipelines, described by their configurations: which networks they have
and what they support.

The description comes from `model_index.json` and the components' configurations, so that an
impossible study is refused before anything heavy is imported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from engine.core.errors import StudyError, brief
from engine.core.paths import local_path
from engine.core.spec import Spec, explained


@dataclass(frozen=True)
class Family:
    """Pipelines with the same networks.

    denoiser: the component that is trained. flow: it learns the velocity between image and noise
    (rectified flow), otherwise the noise of a diffusion. text_encoders: (component, tokenizer) of
    the CLIP encoders, which adaptations may train; T5 is never trained. tokens: whether
    `load_textual_inversion` supports these encoders. lora_targets: the attention layers of the
    denoiser that diffusers' training scripts choose.
    """

    name: str
    denoiser: str
    flow: bool
    text_encoders: tuple[tuple[str, str], ...]
    tokens: bool
    lora_targets: tuple[str, ...]


_ONE = (("text_encoder", "tokenizer"),)
_TWO = (*_ONE, ("text_encoder_2", "tokenizer_2"))
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_JOINT = tuple(
    f"attn.{name}"
    for name in (*_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
)  # fmt: skip

_FAMILIES = {
    "StableDiffusion": Family("Stable Diffusion", "unet", False, _ONE, True, _ATTENTION),
    "StableDiffusionXL": Family("Stable Diffusion XL", "unet", False, _TWO, True, _ATTENTION),
    "StableDiffusion3": Family("Stable Diffusion 3", "transformer", True, _TWO, False, _JOINT),
    "Flux": Family("FLUX", "transformer", True, _ONE, False, _JOINT),
}
# Bytes of each end of a file that enter its digest: whole checkpoints have gigabytes.
_SAMPLED = 2**16
# Endings of the class names that share a family's networks.
_KINDS = ("Pipeline", "Img2ImgPipeline", "InpaintPipeline")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as its configurations describe it.

    configs: configurations by component, of those that exist. scheduler: a class name. refiner: it
    finishes another checkpoint's images.
    """

    model: str
    pipeline: str
    components: frozenset[str]
    configs: dict[str, dict[str, Any]]
    scheduler: str = ""
    refiner: bool = False

    @property
    def family(self) -> Family | None:
        """The family of its pipeline, or None if only sampling is supported."""
        return family_of(self.pipeline)

    @property
    def untrainable(self) -> str | None:
        """The feature that training does not support, or None."""
        if self.scheduler.startswith("EDM"):
            return f"scheduler {self.scheduler}"
        if self.configs.get("vae", {}).get("latents_mean") and self.family is not None:
            return "a VAE with latents_mean"
        return "a refiner" if self.refiner else None

    @property
    def inpaints(self) -> bool:
        """Whether the denoiser takes mask and masked image in addition to the latents."""
        channels = self.configs.get("unet", {}).get("in_channels")
        latents = self.configs.get("vae", {}).get("latent_channels", 4)
        return channels is not None and channels != latents

    @property
    def resolution(self) -> int | None:
        """Side in pixels that it was trained at, or None if its configurations do not say."""
        side = self.configs.get("unet", self.configs.get("transformer", {})).get("sample_size")
        levels = self.configs.get("vae", {}).get("block_out_channels")
        return int(side) * 2 ** (len(levels) - 1) if side and levels else None

    @property
    def multiple(self) -> int:
        """The number that the sides of images must be multiples of."""
        levels = self.configs.get("vae", {}).get("block_out_channels", [0] * 4)
        patches = 1 if "unet" in self.components else 2
        return int(2 ** (len(levels) - 1)) * patches


def family_of(pipeline: str) -> Family | None:
    """The family of a pipeline's class name."""
    for name, family in _FAMILIES.items():
        if pipeline in {f"{name}{kind}" for kind in _KINDS}:
            return family
    return None


def read_checkpoint(section: str, model: str, revision: str | None) -> Checkpoint | None:
    """The description of a local folder, or of a hub's checkpoint in the cache; None for one that
    is not downloaded yet. Errors name `section` of the study.

    Raises `StudyError` if the folder does not exist or holds no pipeline.
    """
    folder = local_path(model)
    local = folder.is_dir()
    if not local and (model.count("/") > 1 or model.startswith((".", "/", "~", "$"))):
        raise StudyError(f"{section}: folder {model} does not exist; correct the path")
    index = _read(folder, model, revision, "model_index.json", local)
    if index is None:
        if local:
            raise StudyError(
                f"{section}: {model} has no model_index.json; name a folder that a diffusers"
                " pipeline was saved to"
            )
        return None
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise StudyError(
            f"{section}: {model}: model_index.json has no _class_name; name a diffusers pipeline"
        )
    components = {
        component
        for component, value in index.items()
        if isinstance(value, list) and value and value[0] is not None
    }
    configs = {}
    for component in components & {"unet", "transformer", "vae"}:
        config = _read(folder, model, revision, f"{component}/config.json", local)
        if config is not None:
            configs[component] = config
    scheduler = index.get("scheduler")
    return Checkpoint(
        model, name, frozenset(components), configs,
        str(scheduler[-1]) if isinstance(scheduler, list) else "",
        bool(index.get("requires_aesthetics_score")),
    )  # fmt: skip


def checkpoint_of(pipeline: Any, model: str) -> Checkpoint:
    """The same description, of a pipeline that is loaded."""
    components = {
        name: component for name, component in pipeline.components.items() if component is not None
    }
    configs = {
        name: dict(components[name].config)
        for name in ("unet", "transformer", "vae")
        if name in components
    }
    return Checkpoint(
        model, type(pipeline).__name__, frozenset(components), configs,
        type(pipeline.scheduler).__name__,
        bool(pipeline.config.get("requires_aesthetics_score")),
    )  # fmt: skip


def folder_digest(model: str) -> str | None:
    """A digest of a local folder: names, sizes, and the first and last 64 KiB of each file; None if
    the model is not a folder."""
    folder = local_path(model)
    if not folder.is_dir():
        return None
    return _digest_of(folder, sorted(item for item in folder.rglob("*") if item.is_file()))


@lru_cache(maxsize=64)
def weights_digest(name: str) -> str | None:
    """The digest of a local folder or a single file, cached because every trial asks for it."""
    path = local_path(name)
    return _digest_of(path.parent, [path]) if path.is_file() else folder_digest(name)


def local_weights(spec: Any, *fields: str) -> dict[str, str]:
    """Digests of the local weights that these fields of a spec name."""
    paths = {name: getattr(spec, name, None) for name in fields}
    digests = {name: weights_digest(path) for name, path in paths.items() if isinstance(path, str)}
    return {name: digest for name, digest in digests.items() if digest is not None}


def _digest_of(folder: Path, paths: Sequence[Path]) -> str:
    hasher = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        hasher.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            hasher.update(file.read(_SAMPLED))
            file.seek(max(0, size - _SAMPLED))
            hasher.update(file.read())
    return hasher.hexdigest()[:16]


def _read(
    folder: Path, model: str, revision: str | None, name: str, local: bool
) -> dict[str, Any] | None:
    if local:
        path: Any = folder / name
    else:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            path = try_to_load_from_cache(model, name, revision=revision)
        except HFValidationError as error:
            raise StudyError(
                f"{model} is neither a folder nor a hub id: {brief(error, 160)}"
            ) from None
        if not isinstance(path, str):
            return None
    try:
        values = json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StudyError(f"{model}: {name} cannot be read: {error}") from None
    return values if isinstance(values, dict) else {}


class DenoisingSettings(Spec):
    """How a pipeline's denoiser is trained further. Names are those of diffusers' training scripts
    where they exist."""

    train_steps: Annotated[int, Field(ge=1)] = 1000
    batch_size: Annotated[int, Field(ge=1)] = 4
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    lr_scheduler: Literal["constant", "constant_with_warmup", "cosine", "linear"] = "constant"
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    adam_weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    # Decay of the averaged weights that sampling uses; 0: sample with the last weights.
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gradient_checkpointing: bool = False
    # What the denoiser learns to predict; None: what the checkpoint predicts. Only for diffusion.
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    # Weight of each noise level's loss: min(SNR, gamma) (Hang et al. 2023); None: equal weights.
    # Only for diffusion.
    snr_gamma: Annotated[float, Field(gt=0)] | None = None
    # Noise that all pixels of a channel share, for learning very dark and very bright images.
    noise_offset: Annotated[float, Field(ge=0, le=1)] = 0.0
    # How noise levels are drawn and weighted, only for flows (Esser et al. 2024).
    weighting_scheme: Literal["none", "logit_normal", "sigma_sqrt", "cosmap"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: Annotated[float, Field(gt=0)] = 1.0
    # Share of images trained without prompt, for guidance.
    proportion_empty_prompts: Annotated[float, Field(ge=0, lt=1)] = 0.1
    # How much more often rare classes are drawn: 0 not at all, 1 until all classes are equal.
    class_balance: Annotated[float, Field(ge=0, le=1)] = 0.5
    # Mirror half of the images. Off, because left and right may differ in meaning.
    random_flip: bool = False
    # Encode each training image once and keep its latents, up to 4 GiB of them.
    cache_latents: bool = True


class LatentSpec(Spec):
    """The autoencoder of a latent diffusion: a given one, or a small one that is trained on the
    same images first."""

    # A folder or hub id of diffusers' AutoencoderKL, or a pipeline's folder; None: train one.
    model: str | None = None
    revision: str | None = None
    # The fields below describe the one to train. Each level after the first halves the image.
    block_out_channels: Annotated[tuple[int, ...], Field(min_length=1, max_length=5)] = (32, 64)
    latent_channels: Annotated[int, Field(ge=1, le=64)] = 4
    train_steps: Annotated[int, Field(ge=1)] = 5000
    batch_size: Annotated[int, Field(ge=1)] = 32
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    # Weight, per pixel, of the latents' divergence from a standard normal distribution.
    kl_weight: Annotated[float, Field(ge=0)] = 1e-4

    @model_validator(mode="after")
    def _consistent(self) -> LatentSpec:
        if any(width % 8 for width in self.block_out_channels):
            raise explained("block_out_channels must be multiples of 8")
        return self
