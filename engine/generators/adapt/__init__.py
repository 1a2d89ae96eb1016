"""Adaptations of a diffusion checkpoint to the study's images.

To add one, write `engine/generators/adapt/<name>.py` with a class `<Name>(Adaptation)`; it then
works with every family of checkpoints that it does not refuse. Plain diffusers loads the weights
that it saves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from engine.core.errors import StudyError
from engine.core.registry import name_of
from engine.core.spec import Configured, S, Spec
from engine.nets.pipelines import Checkpoint, family_of

Scope = Literal["all", "class", "cluster"]
# A condition: class, and cluster within it (0 without clusters).
Pair = tuple[str, int]
# Lists class, cluster and folder of each adaptation in the weights.
ADAPTATIONS = "adaptations.json"


class AdaptSpec(Spec):
    name: str


@dataclass(frozen=True)
class Prior:
    """Images that the checkpoint generates and learns in addition to the real ones, against
    forgetting.

    prompt: their template. count: of each distinct prompt. weight: of their loss.
    """

    prompt: str
    count: int
    weight: float


class Adaptation(Configured[S]):
    """A method of adaptation, with its settings (which include `DenoisingSettings`)."""

    version: ClassVar[int]
    # The default prompt; {label}, {cluster} and {token} are filled in.
    template: ClassVar[str] = "a photo of {label}"
    # Whether each adaptation replaces whole networks.
    replaces_networks: bool = False
    # Whether training learns only the words that stand for {token}.
    needs_token: ClassVar[bool] = False

    def __init__(self, spec: S) -> None:
        self.spec = spec

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise `StudyError` for a checkpoint that cannot be adapted this way."""
        name = name_of(self.spec)
        if checkpoint.family is None:
            raise StudyError(
                f"generators: adapt: {name} supports Stable Diffusion 1, 2, XL, 3 and FLUX;"
                f" {checkpoint.model} is a {checkpoint.pipeline}; remove adapt"
            )
        if checkpoint.untrainable:
            raise StudyError(
                f"generators: adapt: {name} does not support {checkpoint.model}, which has"
                f" {checkpoint.untrainable}; remove adapt"
            )
        encoders = [encoder for encoder, _ in checkpoint.family.text_encoders]
        missing = [encoder for encoder in encoders if encoder not in checkpoint.components]
        if self.trains_text_encoders and missing:
            raise StudyError(
                f"generators: adapt: {name}: {checkpoint.model} has no {missing[0]} to train; set"
                " adapt: lora with train_text_encoder: false"
            )
        if checkpoint.inpaints:
            raise StudyError(
                f"generators: adapt: {name} does not support {checkpoint.model}, an inpainting"
                " checkpoint; name one without inpainting, or remove adapt"
            )

    @property
    def settings(self) -> Any:
        """The `DenoisingSettings` of the training."""
        return self.spec

    @property
    def scope(self) -> Scope:
        """What each adaptation covers."""
        scope: Scope = getattr(self.spec, "scope", "all")
        return scope

    def condition(self) -> Literal["class", "cluster"]:
        """What a token stands for, if there are tokens."""
        return "cluster" if self.scope == "cluster" else "class"

    def token(self, label: str, cluster: int) -> str | None:
        """The text that replaces {token} in prompts, or None without tokens."""
        return None

    @property
    def trains_text_encoders(self) -> bool:
        """Whether text encoders are trained too."""
        return bool(getattr(self.spec, "train_text_encoder", False))

    def prior(self) -> Prior | None:
        """The images for prior preservation, or None."""
        return None

    def new_words(self, prompts: Sequence[str]) -> dict[str, int]:
        """Words in these prompts that training adds to the tokenizer, and the number of tokens of
        each."""
        return {}

    def attach(self, pipeline: Any, words: Mapping[Pair, str]) -> None:
        """Let only the parameters to train require gradients.

        words: the name of each condition in a prompt.
        """
        raise NotImplementedError

    def save(self, pipeline: Any, folder: Path) -> None:
        """Write the trained weights in a form that plain diffusers loads."""
        raise NotImplementedError

    def open(
        self, build: Callable[[Path | None], Any], folders: Sequence[Path]
    ) -> tuple[Any, Callable[[int], None]]:
        """A pipeline with the weights that `save` wrote to `folders`, and a function that chooses
        among them by number.

        build: loads the pipeline of a folder, or the checkpoint itself for None.
        """
        raise NotImplementedError


def freeze(pipeline: Any) -> None:
    """Let no parameter of the pipeline require gradients."""
    from torch.nn import Module

    for component in pipeline.components.values():
        if isinstance(component, Module):
            component.requires_grad_(False)


def trained_components(pipeline: Any, text_encoders: bool) -> list[str]:
    """Names of the trained networks: the denoiser, with `text_encoders` also the CLIP encoders."""
    family = family_of(type(pipeline).__name__)
    assert family is not None, f"{type(pipeline).__name__} should have been refused"
    return [family.denoiser, *(name for name, _ in family.text_encoders if text_encoders)]


def no_choice(number: int) -> None:
    """The choosing function of `open` for a single adaptation."""


def group_of(scope: Scope, label: str, cluster: int) -> Pair:
    """The group of images that share an adaptation with an image of this class and cluster."""
    return {"all": ("", 0), "class": (label, 0), "cluster": (label, cluster)}[scope]
