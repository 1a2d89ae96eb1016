"""Images and texts in one space: equal to plain transformers, averaged over prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from engine.core.errors import StudyError
from engine.nets.text_image import Described, TextImage
from tests.text_image import save_clip

TEMPLATES = ("a photo of a {label}", "a blurry {label}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def pictures(count: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 40, 40, channels), dtype=np.uint8)


def test_probabilities_equal_plain_transformers(folder: Path) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    spec = Described(model=str(folder), templates=("a photo of a {label}",))
    ours = TextImage("curate.labeler", spec, "cpu")
    images = pictures(5)
    plain: Any = AutoImageProcessor
    processor = plain.from_pretrained(folder, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = CLIPModel.from_pretrained(folder)
    model.eval()
    inputs = processor([Image.fromarray(image) for image in images], return_tensors="pt")
    words = tokenizer(["a photo of a cat", "a photo of a dog"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**words, **inputs).logits_per_image.numpy()
    found = ours.logit_scale * ours.images(images) @ ours.classes(spec, ("cat", "dog"), "x").T
    np.testing.assert_allclose(found, logits, atol=1e-3)


def test_prompts_of_a_class_are_averaged_as_unit_vectors(folder: Path) -> None:
    spec = Described(model=str(folder), templates=TEMPLATES, words={"k": ("cat", "dog")})
    ours = TextImage.of("curate.labeler", spec, "cpu")
    prompts = [template.format(label=word) for template in TEMPLATES for word in ("cat", "dog")]
    mean = ours.texts(prompts, "x").mean(0)
    found = ours.classes(spec, ("k", "a_cat"), "x")
    np.testing.assert_allclose(found[0], mean / np.linalg.norm(mean), atol=1e-6)
    # Padding next to longer prompts changes nothing; _ is read as a space.
    plain = Described(model=str(folder), templates=TEMPLATES, words={"a_cat": "a cat"})
    np.testing.assert_allclose(found[1], ours.classes(plain, ("a_cat",), "x")[0], atol=1e-6)
    # The same checkpoint is loaded only once.
    assert TextImage.of("curate.filters.similarity", spec, "cpu") is ours
    assert ours.images(pictures(2, 1)).shape == found.shape


def test_impossible_settings_are_rejected_in_one_line(folder: Path, tmp_path: Path) -> None:
    spec = Described(model=str(folder), words={"bird": "crow"})
    ours = TextImage.of("curate.labeler", spec, "cpu")
    with pytest.raises(StudyError, match=r"curate.labeler.words: unknown class 'bird'; .* cat"):
        ours.classes(spec, ("cat",), "curate.labeler")
    with pytest.raises(StudyError, match=r"has \d+ tokens, but the checkpoint reads 16; shorten"):
        ours.texts(["long words " * 9], "curate.labeler")
    with pytest.raises(StudyError, match=r"curate.labeler.model: .*nowhere"):
        TextImage("curate.labeler", Described(model=str(tmp_path / "nowhere")), "cpu")
    for template in ("no place for it", "{label} of {place}", "{label} }"):
        with pytest.raises(ValidationError, match=r"must contain \{label\} and no other braces"):
            Described(templates=(template,))
    assert Described.model_validate({"words": {3: "three"}}).words == {"3": "three"}
    with pytest.raises(ValidationError, match="at least 1"):
        Described.model_validate({"words": {"a": []}})
