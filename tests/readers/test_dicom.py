from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engine.core import rows
from engine.core.errors import DataError
from engine.core.manifest import Manifest
from engine.core.store import Store
from engine.readers.dicom import Dicom, DicomSpec
from engine.study import Study
from tests.data.test_dicom import RAMP, dicom


def write_series(folder: Path, patients: int, **tags: Any) -> Path:
    random = np.random.default_rng(1)
    for label in ("ill", "well"):
        (folder / label).mkdir(parents=True)
        for patient in range(patients):
            for number in range(2):
                values = np.kron(random.integers(0, 4000, (6, 6)), np.ones((4, 4)))
                data = dicom(values.astype(np.uint16), PatientID=f"{label}-{patient}", **tags)
                # Files from scanners often have no extension.
                name = f"{patient}-{number}" + (".dcm" if number else "")
                (folder / label / name).write_bytes(data)
    return folder


def test_no_patient_is_in_two_splits_and_burned_in_text_gives_a_warning(
    tmp_path: Path, toy_study: Callable[..., Study], run_until: Callable[[Study, str], Manifest],
    store: Store,
) -> None:  # fmt: skip
    folder = write_series(tmp_path / "in", 12)
    study = toy_study({"name": "dicom", "root": str(folder)}, split={"group": "column"},
                      preprocess={"size": 16, "channels": "L"})  # fmt: skip
    manifest = run_until(study, "ingest")
    groups = {
        split: set(
            pa.concat_tables(store.tables(manifest.keys(split=split)))[rows.GROUP_ID].to_pylist()
        )
        for split in rows.SPLITS
    }
    assert sum(map(len, groups.values())) == len(set.union(*groups.values())) == 24
    assert {"code": "burned_in_unknown", "fields": {"files": 48}} in manifest.metrics["warnings"]


def test_patient_id_is_not_revealed_by_folder_names(tmp_path: Path) -> None:
    for patient in ("kim", "lee"):
        for label in ("ill", "well"):
            (tmp_path / patient / label).mkdir(parents=True)
            (tmp_path / patient / label / "one").write_bytes(dicom(RAMP, PatientID=patient))
    spec = DicomSpec(root=str(tmp_path), layout=["group", "class"])
    by_folder = Dicom(spec).records()
    groups = by_folder[rows.GROUP_ID].to_pylist()
    assert len(set(groups)) == 2
    assert not {"kim", "lee"} & set(groups)
    # The hash is of the id in the file.
    for patient in ("kim", "lee"):
        held = Dicom(DicomSpec(root=str(tmp_path / patient))).records()[rows.GROUP_ID].to_pylist()
        assert set(held) <= set(groups)


def test_series_without_patients_need_another_group(
    tmp_path: Path, toy_study: Callable[..., Study], run_until: Callable[[Study, str], Manifest]
) -> None:
    folder = write_series(tmp_path / "in", 4)
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(dicom(RAMP))
    study = toy_study({"name": "dicom", "root": str(folder)}, split={"group": "column"})
    with pytest.raises(DataError, match="16 images have no group"):
        run_until(study, "ingest")


def test_dicom_files_are_recognised_by_content(tmp_path: Path) -> None:
    (tmp_path / "in" / "ill").mkdir(parents=True)
    names = ("IM0001", "a.DCM", "1.2.840.113619.2.5.1762583153", ".DS_Store", "DICOMDIR", "x.txt")
    for name in names:
        (tmp_path / "in" / "ill" / name).write_bytes(dicom(RAMP, PatientID=name))
    (tmp_path / "in" / "README").write_text("of a scanner")
    records = Dicom(DicomSpec(root=str(tmp_path / "in"))).records()
    found = {uri.split("/")[1] for uri in records[rows.URI].to_pylist()}
    assert found == {"IM0001", "a.DCM", "1.2.840.113619.2.5.1762583153"}
