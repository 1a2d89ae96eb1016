"""The diffusion generator inside a study: prompts from request to file, training, warnings."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from engine.core import rows
from engine.core.errors import ResumeError
from engine.core.manifest import Manifest
from engine.core.store import Store
from engine.plan import plan
from engine.study import Study
from tests.pipelines import save_pipeline


def test_study_adapts_a_checkpoint_and_generates_images(
    image_folder: Callable[..., Path],
    toy_study: Callable[..., Study],
    run_until: Callable[[Study, str], Manifest],
    store: Store,
    tmp_path: Path,
) -> None:
    model = save_pipeline("sd", tmp_path / "pipelines")
    generator = {
        "name": "diffusion", "model": str(model), "precision": "fp32", "resolution": 32,
        "mode": "image2image", "strength": 0.6, "num_inference_steps": 4,
        "prompt": ["a photo of {label}", "a blurry photo of a {label} that is far too long"],
        "adapt": {"name": "lora", "rank": 2, "train_steps": 2, "batch_size": 2},
    }  # fmt: skip
    study = toy_study(
        image_folder({"cat": 12, "dog": 20}),
        generators={"sd": generator}, request={"per_class": 6, "classes": ["cat"]},
    )  # fmt: skip
    manifest = run_until(study, "generate")
    keys = [part.key for part in manifest.parts if part.key.endswith(".parquet")]
    table = pa.concat_tables(store.tables(keys))
    assert table.num_rows == 6
    assert table[rows.STRENGTH].to_pylist() == pytest.approx([0.6] * 6)
    assert len(set(table[rows.PARENT_ID].to_pylist())) > 1
    prompts = table[rows.PROMPT].to_pylist()
    assert prompts.count("a photo of cat") == 3
    first = table.slice(0, 1).to_pylist()[0]
    image = Image.open(io.BytesIO(first[rows.IMAGE]["bytes"]))
    assert json.loads(image.text["synthetic"])["prompt"] == first[rows.PROMPT]
    (notice,) = manifest.metrics["warnings"]
    assert notice["code"] == "prompts_truncated"
    assert (notice["fields"]["truncated"], notice["fields"]["limit"]) == (1, 16)

    # Other sampling settings do not retrain; another prompt does.
    steps = {step.kind: step.key for step in plan(study)}
    for fields, same in (({"strength": 0.9}, True), ({"prompt": "x {label}"}, False)):
        changed = study.model_dump(mode="json")
        changed["generators"]["sd"] |= fields
        found = {step.kind: step.key for step in plan(Study.model_validate(changed))}
        assert (found["finetune"] == steps["finetune"]) == same
        assert found["generate"] != steps["generate"]

    # A different checkpoint under the same name is detected.
    before = run_until(study, "finetune")
    assert run_until(study, "finetune") == before
    shutil.rmtree(model)
    save_pipeline("sdxl", tmp_path / "pipelines").rename(model)
    after = run_until(study, "finetune")
    assert after.metrics["outside"] != before.metrics["outside"]
    assert after.digest != before.digest


def test_images_of_another_checkpoint_with_the_same_name_are_not_reused(
    image_folder: Callable[..., Path],
    toy_study: Callable[..., Study],
    run_until: Callable[[Study, str], Manifest],
    tmp_path: Path,
) -> None:
    model = save_pipeline("sd", tmp_path / "pipelines")
    generator = {
        "name": "diffusion", "model": str(model), "precision": "fp32", "resolution": 32,
        "num_inference_steps": 2,
    }  # fmt: skip
    study = toy_study(
        image_folder({"cat": 12, "dog": 20}),
        generators={"sd": generator}, request={"per_class": 2, "classes": ["cat"]},
    )  # fmt: skip
    run_until(study, "generate")
    shutil.rmtree(model)
    save_pipeline("sdxl", tmp_path / "pipelines").rename(model)
    with pytest.raises(ResumeError, match=r"--discard generate\.sd"):
        run_until(study, "generate")
