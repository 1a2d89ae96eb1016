"""Textual inversion (Gal et al. 2023): learns only the embedding of a new word for each class or
cluster.

The weights are one `<name>.safetensors` for each word and text encoder, which
`load_textual_inversion` reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from engine.core.errors import StudyError
from engine.core.names import slug
from engine.generators.adapt import Adaptation, AdaptSpec, Pair, Scope, freeze, no_choice
from engine.nets.pipelines import Checkpoint, DenoisingSettings, family_of

_INDEX = "tokens.json"


class TextualInversionSpec(DenoisingSettings, AdaptSpec):
    name: Literal["textual_inversion"] = "textual_inversion"
    # class: a word for each class. cluster: one for each cluster of each class.
    scope: Literal["class", "cluster"] = "class"
    learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    adam_weight_decay: Annotated[float, Field(ge=0)] = 0.0
    proportion_empty_prompts: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # Embeddings of one word.
    num_vectors: Annotated[int, Field(ge=1, le=32)] = 1
    # The words that learning starts from; None: the name of the class.
    initializer_token: str | None = None


class TextualInversion(Adaptation[TextualInversionSpec]):
    version = 1
    template = "a photo of {token}"
    needs_token = True

    def check(self, checkpoint: Checkpoint) -> None:
        super().check(checkpoint)
        family = checkpoint.family
        assert family is not None
        if not family.tokens:
            raise StudyError(
                f"generators: adapt: textual_inversion does not support {family.name}"
                f" ({checkpoint.model}); set adapt: lora or dreambooth"
            )

    @property
    def scope(self) -> Scope:
        """All words are learnt together: each has an embedding of its own."""
        return "all"

    def condition(self) -> Literal["class", "cluster"]:
        return self.spec.scope

    def token(self, label: str, cluster: int) -> str | None:
        name = slug(label) + (f"-{cluster}" if self.spec.scope == "cluster" else "")
        return f"<{name}>"

    @property
    def trains_text_encoders(self) -> bool:
        return True

    def new_words(self, prompts: Sequence[str]) -> dict[str, int]:
        words = {word for prompt in prompts for word in re.findall(r"<[a-z0-9-]+>", prompt)}
        return dict.fromkeys(sorted(words), self.spec.num_vectors)

    def attach(self, pipeline: Any, words: Mapping[Pair, str]) -> None:
        import torch

        freeze(pipeline)
        self.learned: dict[str, list[Any]] = {}
        tokens = {str(self.token(*pair)): words[pair] for pair in words}
        for encoder, tokenizer in _encoders(pipeline):
            first = len(tokenizer)
            embedding = encoder.get_input_embeddings()
            starts = []
            for word in tokens.values():
                ids = tokenizer(
                    self.spec.initializer_token or word, add_special_tokens=False
                ).input_ids
                if not ids:
                    raise StudyError(
                        f"generators: adapt: initializer_token: the checkpoint's tokenizer has no"
                        f" token for {word!r}; name another word"
                    )
                start = embedding.weight[ids].detach().float().mean(0)
                starts += [start] * self.spec.num_vectors
            tokenizer.add_tokens([name for token in tokens for name in self._parts(token)])
            encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            embedding = encoder.get_input_embeddings()
            embedding.requires_grad_(False)
            embedding.register_parameter("learned", torch.nn.Parameter(torch.stack(starts)))
            embedding.register_forward_hook(_learnt_from(first))
            for number, token in enumerate(tokens):
                rows = slice(number * self.spec.num_vectors, (number + 1) * self.spec.num_vectors)
                self.learned.setdefault(token, []).append((embedding, rows))

    def _parts(self, token: str) -> list[str]:
        """The names of a word's embeddings, as diffusers builds them."""
        return [token, *(f"{token}_{number}" for number in range(1, self.spec.num_vectors))]

    def save(self, pipeline: Any, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        files: dict[str, list[str]] = {}
        for token, places in self.learned.items():
            name = token.strip("<>")
            files[token] = []
            for number, (embedding, rows) in enumerate(places):
                file = f"{name}.safetensors" if number == 0 else f"{name}.{number + 1}.safetensors"
                vectors = embedding.learned[rows].detach().float().cpu().contiguous()
                save_file({token: vectors}, folder / file)
                files[token].append(file)
        (folder / _INDEX).write_text(json.dumps(files))

    def open(
        self, build: Callable[[Path | None], Any], folders: Sequence[Path]
    ) -> tuple[Any, Callable[[int], None]]:
        pipeline = build(None)
        (folder,) = folders
        for token, files in json.loads((folder / _INDEX).read_text()).items():
            for file, (encoder, tokenizer) in zip(files, _encoders(pipeline), strict=True):
                pipeline.load_textual_inversion(
                    folder / file, token=token, text_encoder=encoder, tokenizer=tokenizer
                )
        return pipeline, no_choice


def _encoders(pipeline: Any) -> list[tuple[Any, Any]]:
    family = family_of(type(pipeline).__name__)
    assert family is not None
    return [
        (getattr(pipeline, encoder), getattr(pipeline, tokenizer))
        for encoder, tokenizer in family.text_encoders
    ]


def _learnt_from(first: int) -> Callable[..., Any]:
    """A hook that returns the learnt embeddings for token ids from `first` on."""

    def merge(embedding: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        import torch

        places = inputs[0] - first
        learnt = embedding.learned.to(output.dtype)[places.clamp(min=0)]
        return torch.where((places >= 0)[..., None], learnt, output)

    return merge
