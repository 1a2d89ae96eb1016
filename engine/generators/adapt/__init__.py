"""Ways to make a diffusion checkpoint know the study's images.

To add one, write `engine/generators/adapt/<name>.py` with a class `<Name>(Adaptation)`; it then
works with every family of checkpoints that it does not refuse. What it saves is what plain
diffusers loads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from engine.core.errors import StudyError
from engine.core.spec import Spec
from engine.nets.pipelines import Checkpoint, family_of

Scope = Literal["all", "class", "cluster"]
# A condition: class, and cluster within it (0 where clusters do not count).
Pair = tuple[str, int]


class AdaptSpec(Spec):
    name: str


@dataclass(frozen=True)
class Prior:
    """Images of the checkpoint's own making, learnt beside the real ones so that it forgets
    nothing.

    prompt: template of what they show. count: of each distinct prompt. weight: of their loss.
    """

    prompt: str
    count: int
    weight: float


class Adaptation:
    """One way of adapting, with its settings (which include `DenoisingSettings`)."""

    version: ClassVar[int]
    Spec: ClassVar[type[AdaptSpec]]
    # The prompt where the study gives none; {label}, {cluster} and {token} are filled in.
    template: ClassVar[str] = "a photo of {label}"
    # Whether each adaptation replaces whole networks.
    whole: bool = False
    # Whether only what prompts call {token} is learnt.
    needs_token: ClassVar[bool] = False

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint that cannot be adapted so. Raises `StudyError`."""
        name = self.spec.name
        if checkpoint.family is None:
            raise StudyError(
                f"generators: adapt: {name} is for Stable Diffusion 1, 2, XL, 3 and FLUX;"
                f" {checkpoint.model} is a {checkpoint.pipeline}; leave adapt out"
            )
        if checkpoint.strange:
            raise StudyError(
                f"generators: adapt: {name}: {checkpoint.model} cannot be trained here:"
                f" {checkpoint.strange} is not known; leave adapt out"
            )
        encoders = [encoder for encoder, _ in checkpoint.family.text_encoders]
        missing = [encoder for encoder in encoders if encoder not in checkpoint.components]
        if self.reads and missing:
            raise StudyError(
                f"generators: adapt: {name}: {checkpoint.model} has no {missing[0]} to train; say"
                " adapt: lora, with train_text_encoder: false"
            )
        if checkpoint.repaints:
            raise StudyError(
                f"generators: adapt: {name}: {checkpoint.model} takes a mask beside the image;"
                " adapt the checkpoint that makes whole images, or leave adapt out"
            )

    @property
    def settings(self) -> Any:
        """`DenoisingSettings` of the training."""
        return self.spec

    @property
    def scope(self) -> Scope:
        """What has an adaptation of its own."""
        scope: Scope = getattr(self.spec, "scope", "all")
        return scope

    def condition(self) -> Literal["class", "cluster"]:
        """What tokens stand for, where there are any."""
        return "cluster" if self.scope == "cluster" else "class"

    def token(self, label: str, cluster: int) -> str | None:
        """What stands for {token} in prompts, or None where there is no such thing."""
        return None

    @property
    def reads(self) -> bool:
        """Whether text encoders are trained too."""
        return bool(getattr(self.spec, "train_text_encoder", False))

    def prior(self) -> Prior | None:
        return None

    def new_words(self, prompts: Sequence[str]) -> dict[str, int]:
        """Words of these prompts that training adds to the tokenizer, and how many tokens each
        becomes."""
        return {}

    def attach(self, pipeline: Any, words: Mapping[Pair, str]) -> None:
        """Make the parameters that are to be trained, and only those, require gradients.

        words: what each condition is called in a prompt.
        """
        raise NotImplementedError

    def save(self, pipeline: Any, folder: Path) -> None:
        """Write what was trained, in a form that plain diffusers loads."""
        raise NotImplementedError

    def open(
        self, build: Callable[[Path | None], Any], folders: Sequence[Path]
    ) -> tuple[Any, Callable[[int], None]]:
        """A pipeline with what `save` wrote to each of `folders`, and what makes it sample by the
        one of a number.

        build: loads the pipeline of a folder, or the checkpoint itself for None.
        """
        raise NotImplementedError


def freeze(pipeline: Any) -> None:
    """Let no parameter of a pipeline require gradients."""
    from torch.nn import Module

    for component in pipeline.components.values():
        if isinstance(component, Module):
            component.requires_grad_(False)


def trained_components(pipeline: Any, text_encoders: bool) -> list[str]:
    """Names of the networks that a training of the whole pipeline trains."""
    family = family_of(type(pipeline).__name__)
    assert family is not None, f"{type(pipeline).__name__} was not refused"
    return [family.denoiser, *(name for name, _ in family.text_encoders if text_encoders)]


def stay(number: int) -> None:
    """For `open`, where all adaptations are in place at once."""
