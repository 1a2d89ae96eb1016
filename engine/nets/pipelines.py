"""What is known of diffusers' pipelines before any is loaded: which networks a checkpoint has, and
what can be done with it.

Read from `model_index.json` and the configurations beside it, so that a study that asks for what
cannot work is refused before anything heavy is imported.
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
from pydantic_core import PydanticCustomError

from engine.core.errors import StudyError
from engine.core.spec import Spec

MODES = ("text2image", "image2image", "inpainting")


@dataclass(frozen=True)
class Family:
    """Pipelines around the same networks.

    denoiser: the component that is trained. flow: it learns a velocity between image and noise
    (rectified flow), else the noise of a diffusion. text_encoders: (component, tokenizer) of the
    CLIP ones, which adaptations may train; of T5 none does. tokens: whether
    `load_textual_inversion` puts embeddings into those. lora_targets: the attention layers of the
    denoiser, as diffusers' training scripts choose them.
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
# Bytes of each end of a file that tell it from another: whole checkpoints have gigabytes.
_SAMPLED = 2**16
# Ends of the class names that share a family's networks.
_KINDS = ("Pipeline", "Img2ImgPipeline", "InpaintPipeline")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as its configurations tell of it. `configs` has those of components that were
    found, by name; `scheduler` is a class name; a `refiner` finishes another checkpoint's
    images."""

    model: str
    pipeline: str
    components: frozenset[str]
    configs: dict[str, dict[str, Any]]
    scheduler: str = ""
    refiner: bool = False

    @property
    def family(self) -> Family | None:
        """The family of its pipeline, or None where only sampling is known to work."""
        return family_of(self.pipeline)

    @property
    def strange(self) -> str | None:
        """What about it the training here does not know, or None."""
        if self.scheduler.startswith("EDM"):
            return f"its {self.scheduler}"
        if self.configs.get("vae", {}).get("latents_mean") and self.family is not None:
            return "the mean that its VAE takes from latents"
        return "a refiner" if self.refiner else None

    @property
    def repaints(self) -> bool:
        """Whether the denoiser takes mask and masked image beside the latents."""
        taken = self.configs.get("unet", {}).get("in_channels")
        latents = self.configs.get("vae", {}).get("latent_channels", 4)
        return taken is not None and taken != latents

    @property
    def resolution(self) -> int | None:
        """Side in pixels that it was trained at, where its configurations say so."""
        side = self.configs.get("unet", self.configs.get("transformer", {})).get("sample_size")
        levels = self.configs.get("vae", {}).get("block_out_channels")
        return int(side) * 2 ** (len(levels) - 1) if side and levels else None

    @property
    def multiple(self) -> int:
        """What the sides of images must be multiples of."""
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
    """What the files of a local folder, or of a hub's checkpoint that was fetched before, say; None
    for one that is not here yet. `section` of the study names it in an error.

    Raises `StudyError` where there is no such folder, or it holds no pipeline.
    """
    folder = Path(model).expanduser()
    local = folder.is_dir()
    if not local and (model.count("/") > 1 or model.startswith((".", "/", "~"))):
        raise StudyError(f"{section}: {model}: there is no such folder")
    index = _read(folder, model, revision, "model_index.json", local)
    if index is None:
        if local:
            raise StudyError(
                f"{section}: {model} has no model_index.json; it must be a folder that a diffusers"
                " pipeline was saved to"
            )
        return None
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise StudyError(f"{section}: {model}: model_index.json names no pipeline (_class_name)")
    held = {
        component
        for component, value in index.items()
        if isinstance(value, list) and value and value[0] is not None
    }
    configs = {}
    for component in held & {"unet", "transformer", "vae"}:
        config = _read(folder, model, revision, f"{component}/config.json", local)
        if config is not None:
            configs[component] = config
    scheduler = index.get("scheduler")
    return Checkpoint(
        model, name, frozenset(held), configs,
        str(scheduler[-1]) if isinstance(scheduler, list) else "",
        bool(index.get("requires_aesthetics_score")),
    )  # fmt: skip


def folder_digest(model: str) -> str | None:
    """A digest of a local folder: names, sizes, and the first and last 64 KiB of each file; None
    where the model is not a folder."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return None
    return _digest_of(folder, sorted(item for item in folder.rglob("*") if item.is_file()))


@lru_cache(maxsize=64)
def weights_digest(name: str) -> str | None:
    """The same of a local folder or a single file, once in a process: it is asked for by trial
    after trial."""
    path = Path(name).expanduser()
    return _digest_of(path.parent, [path]) if path.is_file() else folder_digest(name)


def local_weights(spec: Any, *fields: str) -> dict[str, str]:
    """Digests of the weights that these fields of a spec name, of those that lie here."""
    named = {name: getattr(spec, name, None) for name in fields}
    found = {name: weights_digest(path) for name, path in named.items() if isinstance(path, str)}
    return {name: digest for name, digest in found.items() if digest is not None}


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
            text = " ".join(str(error).split())[:160]
            raise StudyError(f"{model}: is neither a folder nor a hub id: {text}") from None
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
    """How a pipeline's denoiser is trained on, in the names of diffusers' training scripts where
    they have one."""

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
    # Of the averaged weights that sampling uses; 0: the last weights as they are.
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gradient_checkpointing: bool = False
    # What the denoiser learns to predict; None: what the checkpoint predicts. Of diffusion alone.
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    # Weigh the loss of each noise level by min(SNR, gamma) (Hang et al. 2023); None: all alike. Of
    # diffusion alone.
    snr_gamma: Annotated[float, Field(gt=0)] | None = None
    # Noise that all pixels of a channel share, so that very dark and very bright images are learnt.
    noise_offset: Annotated[float, Field(ge=0, le=1)] = 0.0
    # How noise levels are drawn and weighed where the checkpoint learns a flow (Esser et al. 2024).
    weighting_scheme: Literal["none", "logit_normal", "sigma_sqrt", "cosmap"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: Annotated[float, Field(gt=0)] = 1.0
    # Share of images trained without prompt, for guidance.
    proportion_empty_prompts: Annotated[float, Field(ge=0, lt=1)] = 0.1
    # How far rare classes are drawn more often: 0 not at all, 1 until all classes are drawn alike.
    class_balance: Annotated[float, Field(ge=0, le=1)] = 0.5
    # Mirror half of the images; off: left and right may mean something.
    random_flip: bool = False
    # Encode each training image once and keep its latents, up to 4 GiB of them.
    cache_latents: bool = True


class LatentSpec(Spec):
    """The autoencoder in whose latents a diffusion works: a given one, or a small one that is
    trained on the same images first."""

    # A folder or hub id of diffusers' AutoencoderKL, or a pipeline's folder; None: it is trained.
    model: str | None = None
    revision: str | None = None
    # Of one that is trained. Each level after the first halves the image.
    block_out_channels: Annotated[tuple[int, ...], Field(min_length=1, max_length=5)] = (32, 64)
    latent_channels: Annotated[int, Field(ge=1, le=64)] = 4
    train_steps: Annotated[int, Field(ge=1)] = 5000
    batch_size: Annotated[int, Field(ge=1)] = 32
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    # Of the divergence of the latents from a standard normal distribution, for each pixel.
    kl_weight: Annotated[float, Field(ge=0)] = 1e-4

    @model_validator(mode="after")
    def _fits(self) -> LatentSpec:
        if any(width % 8 for width in self.block_out_channels):
            raise PydanticCustomError("explained", "block_out_channels must be multiples of 8")
        return self
