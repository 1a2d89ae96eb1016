"""Prompts that are longer than a checkpoint's text encoders read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.core.errors import StudyError, brief
from engine.core.notice import Notice
from engine.core.paths import local_path
from engine.nets.pipelines import read_checkpoint

# The most tokens that pipelines pass to a T5 encoder.
_T5 = {"StableDiffusion3": 256, "Flux": 512}


def truncation_warnings(
    model: str, revision: str | None, prompts: Sequence[str], words: Mapping[str, int]
) -> list[Notice]:
    """A warning about prompts that are longer than the checkpoint reads; empty if all fit.

    words: words that training adds to the tokenizer, and the number of tokens of each. If several
    text encoders differ, the largest limit counts.
    """
    try:
        tokenizer, limit = _longest(model, revision)
    except (OSError, ValueError, KeyError, StudyError) as error:
        return [Notice.of("prompts_unchecked", why=brief(error, 120))]
    tokenizer.add_tokens(list(words))
    cut = []
    for prompt in prompts:
        ids = tokenizer(prompt, truncation=False, add_special_tokens=False).input_ids
        more = sum(prompt.count(word) * (count - 1) for word, count in words.items())
        # Special tokens are start and end, or only an end.
        room = limit - tokenizer.num_special_tokens_to_add() - more
        if len(ids) > room:
            cut.append((prompt, tokenizer.decode(ids[max(0, room) :]).strip()))
    if not cut:
        return []
    prompt, rest = cut[0]
    return [
        Notice.of(
            "prompts_truncated", truncated=len(cut), prompts=len(prompts), limit=limit,
            first=_short(prompt), rest=_short(rest),
        )
    ]  # fmt: skip


def _longest(model: str, revision: str | None) -> tuple[Any, int]:
    """The tokenizer with the largest limit, and the limit."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    # Its own warning about long prompts is less clear.
    logging.set_verbosity_error()
    checkpoint = read_checkpoint("generators: model", model, revision)
    components = checkpoint.components if checkpoint else frozenset({"tokenizer"})
    source = str(local_path(model))
    tokenizers = []
    for name in sorted(name for name in components if name.startswith("tokenizer")):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, subfolder=name)
        limit = tokenizer.model_max_length
        if "T5" in type(tokenizer).__name__ and checkpoint:
            limit = next(
                (most for kind, most in _T5.items() if checkpoint.pipeline.startswith(kind)), limit
            )
        tokenizers.append((min(limit, 10_000), tokenizer))
    if not tokenizers:
        raise StudyError(f"{model} has no tokenizer")
    limit, tokenizer = max(tokenizers, key=lambda entry: entry[0])
    return tokenizer, limit


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:79] + "…")
