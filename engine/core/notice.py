"""What the user must know of a result: a code and its figures.

The sentence of each code is in `engine/wording.py`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from engine.core.spec import Spec

Code = Literal[
    # The sentence itself: of plugins from elsewhere, and of results stored as text.
    "recorded",
    # Readers, ingest and audit.
    "burned_in", "burned_in_unknown", "small_pictures", "similar_pictures", "similar_groups",
    "alike_pictures", "near_contradictory",
    "no_groups", "leaks_resolved", "pixel_embedder", "one_group", "files_skipped", "excluded",
    "no_value_names", "zeros_differ", "groups_differ", "bits_unused", "frames_unused",
    "cut_away", "turned", "set_aside", "names_trimmed",
    "seen_in_train", "seen_before",
    "small_class", "confounded", "weak_judge",
    # Relabel.
    "weak_voters",
    # Cluster.
    "clusters_dissolved", "clusters_tiny",
    # Request.
    "prompts_truncated", "prompts_unchecked", "overlapping_draws",
    # Curate.
    "copies", "covers_nothing", "one_picture", "shows_no_class", "few_to_judge", "blind_labeler",
    # Fidelity.
    "few_for_frechet", "small_train", "near_train", "classes_omitted", "few_in_val",
    "few_generated",
    # Search.
    "hardly_learnt",
    # External test sets.
    "external_seen",
    # Confirm.
    "near_chance",
    # Evaluate: why a contrast cannot be decided.
    "few_replicates", "few_groups", "few_of_class", "unequal_groups", "few_draws", "no_spread",
]  # fmt: skip


class Notice(Spec):
    """A warning, or an obstacle to a verdict."""

    code: Code
    fields: dict[str, int | float | str] = {}

    @classmethod
    def of(cls, code: Code, **fields: int | float | str) -> Notice:
        return cls(code=code, fields=fields)

    @model_validator(mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return {"code": "recorded", "fields": {"text": value}} if isinstance(value, str) else value
