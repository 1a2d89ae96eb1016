"""What of a prompt a checkpoint's text encoders never see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.core.errors import StudyError
from engine.nets.pipelines import read_checkpoint

# Tokens that pipelines hand to a T5 encoder at most.
_T5 = {"StableDiffusion3": 256, "Flux": 512}


def cut_off(
    model: str, revision: str | None, prompts: Sequence[str], words: Mapping[str, int]
) -> list[str]:
    """A sentence on the prompts that are longer than the checkpoint reads; none where all fit.

    words: that training adds to the tokenizer, and how many tokens each becomes. Where one of
    several text encoders reads more than the others, its limit counts.
    """
    try:
        tokenizer, limit = _longest(model, revision)
    except (OSError, ValueError, KeyError, StudyError) as error:
        text = " ".join(str(error).split())[:120]
        return [f"whether prompts are cut off could not be found out: {text}"]
    tokenizer.add_tokens(list(words))
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, truncation=False, add_special_tokens=False).input_ids
        more = sum(prompt.count(word) * (count - 1) for word, count in words.items())
        # A start and an end, or an end alone.
        room = limit - tokenizer.num_special_tokens_to_add() - more
        if len(ids) > room:
            found.append((prompt, tokenizer.decode(ids[max(0, room) :]).strip()))
    if not found:
        return []
    prompt, rest = found[0]
    return [
        f"{len(found)} of {len(prompts)} prompts are longer than the {limit} tokens that the"
        f" checkpoint reads; of {_short(prompt)} it never sees {_short(rest)}"
    ]


def _longest(model: str, revision: str | None) -> tuple[Any, int]:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    # Of a prompt that is too long it would say so itself, and less clearly.
    logging.set_verbosity_error()
    checkpoint = read_checkpoint("generators: model", model, revision)
    held = checkpoint.components if checkpoint else frozenset({"tokenizer"})
    source = str(Path(model).expanduser())
    found = []
    for name in sorted(component for component in held if component.startswith("tokenizer")):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, subfolder=name)
        limit = tokenizer.model_max_length
        if "T5" in type(tokenizer).__name__ and checkpoint:
            limit = next(
                (most for kind, most in _T5.items() if checkpoint.pipeline.startswith(kind)), limit
            )
        found.append((min(limit, 10_000), tokenizer))
    if not found:
        raise StudyError(f"{model} has no tokenizer")
    limit, tokenizer = max(found, key=lambda entry: entry[0])
    return tokenizer, limit


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:79] + "…")
