"""Impossible settings are rejected when the study is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.core.errors import StudyError
from engine.generators.diffusion import DiffusionSpec
from engine.study import Study, validate
from tests.generators.diffusion.tiny import made


def refused(model: Path | str, match: str, adapt: Any = None, **fields: Any) -> None:
    with pytest.raises(StudyError, match=match) as caught:
        made(model, adapt, **fields).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_textual_inversion_is_rejected_for_unsupported_pipelines(
    folders: dict[str, Path], kind: str
) -> None:
    refused(folders[kind], "does not support .*set adapt: lora", "textual_inversion")


def test_textual_inversion_is_rejected_without_a_text_encoder(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    import json
    import shutil

    folder = tmp_path / "blind"
    shutil.copytree(folders["sd"], folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder": [None, None]}))
    refused(folder, "has no text_encoder", "textual_inversion")


def test_textual_inversion_is_rejected_if_prompts_have_no_token(folders: dict[str, Path]) -> None:
    refused(
        folders["sd"], "lacks {token}, the word that textual_inversion learns; add it",
        "textual_inversion", prompts={"cat": "a photo of {label}"},
    )  # fmt: skip
    made(folders["sd"], "textual_inversion", negative_prompt="blurry").check()


def test_negative_prompt_is_rejected_if_the_pipeline_ignores_it(folders: dict[str, Path]) -> None:
    refused(folders["flux"], "is distilled and ignores it; remove it", negative_prompt="blurry")


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"scheduler": ["diffusers", "EDMEulerScheduler"]}, "has scheduler EDMEulerScheduler"),
        ({"requires_aesthetics_score": True}, "has a refiner; remove adapt"),
        ({"text_encoder_2": [None, None]}, "has no text_encoder_2 to train"),
    ],
    ids=["edm", "refiner", "no text encoder"],
)
def test_checkpoints_with_another_training_are_rejected(
    folders: dict[str, Path], tmp_path: Path, changed: dict[str, Any], match: str
) -> None:
    import json
    import shutil

    folder = tmp_path / "other"
    shutil.copytree(folders["sdxl"], folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **changed}))
    refused(folder, match, {"name": "lora", "train_text_encoder": True})


def test_other_pipelines_can_be_sampled_but_not_adapted(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    made(tmp_path).check()
    refused(tmp_path, "is a KandinskyPipeline; remove adapt", "lora")


def test_inpainting_checkpoints_cannot_be_adapted_or_sampled_from_text(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    import json
    import shutil

    folder = tmp_path / "inpaint"
    shutil.copytree(folders["sd"], folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 9}))
    refused(folder, "an inpainting checkpoint; name one", "lora")
    refused(folder, "set mode: inpainting")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"resolution": 33}, "33 px is not a multiple of 2"),
        ({"prompt": "a photo of {token}"}, "has {token}, which only dreambooth"),
    ],
)
def test_unsupported_request_is_rejected(
    folders: dict[str, Path], fields: dict[str, Any], match: str
) -> None:
    refused(folders["sd"], match, **fields)


def test_flow_rejects_diffusion_schedulers(folders: dict[str, Path]) -> None:
    refused(folders["sd3"], "is a flow; set scheduler: checkpoint", scheduler="ddim")


def test_folder_without_a_pipeline_is_rejected(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "folder .* does not exist")
    refused(tmp_path, "has no model_index.json")
    made("owner/never-fetched").check()  # cannot be checked before it is downloaded


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"prompt": "a {colour} cat"}, "unknown placeholder {colour}; use {label}"),
        ({"prompt": "a {label"}, "single brace .* write {{ for a brace"),
        ({"prompt": []}, "at least 1 item"),
        ({"adapt": "lore"}, "no generators adapt named 'lore'; choose from dreambooth, full, lora"),
        ({"adapt": {"name": "dreambooth", "class_prompt": "a {x}"}}, "class_prompt: .*holder {x}"),
        ({"adapt": {"name": "lora", "rank": 0}}, "adapt.rank: must be greater than or equal to 1"),
        ({"mode": "image2image", "num_inference_steps": 2, "strength": 0.3}, "leaves no step"),
        ({"cluster_prompts": {"cat": {"first": "x"}}}, "cluster_prompts"),
    ],
)
def test_invalid_settings_are_rejected_by_name(fields: dict[str, Any], match: str) -> None:
    study = {
        "name": "x", "reader": "digits", "preprocess": {"size": 16},
        "generators": {"sd": {"name": "diffusion", "model": "owner/model", **fields}},
    }  # fmt: skip
    with pytest.raises(StudyError, match=match):
        validate(Study, study, "x.yaml")


def test_adapt_none_leaves_the_checkpoint_unchanged() -> None:
    for adapt in (None, "none", {"name": "none"}):
        assert not made("owner/model", adapt and (adapt if adapt == "none" else None)).trainable
        spec = DiffusionSpec.model_validate({"model": "owner/model", "adapt": adapt})
        assert spec == DiffusionSpec(model="owner/model")
