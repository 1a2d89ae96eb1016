from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.data.decoding import decode
from engine.data.dicom import decode_dicom, read_header
from engine.data.images import Preprocess, Rejected
from engine.data.sandbox import Sandbox

pydicom = pytest.importorskip("pydicom")


def dicom(values: np.ndarray, **tags: Any) -> bytes:
    """A file with these values: uint16 or int16 (height, width), or uint8 (height, width, 3)."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    held = Dataset()
    held.file_meta = meta
    held.Rows, held.Columns = values.shape[:2]
    held.SamplesPerPixel = 3 if values.ndim == 3 else 1
    held.PhotometricInterpretation = "RGB" if values.ndim == 3 else "MONOCHROME2"
    if values.ndim == 3:
        held.PlanarConfiguration = 0
    held.BitsAllocated = held.BitsStored = 8 * values.dtype.itemsize
    held.HighBit = held.BitsStored - 1
    held.PixelRepresentation = int(values.dtype == np.int16)
    held.PixelData = values.tobytes()
    for name, value in tags.items():
        setattr(held, name, value)
    target = io.BytesIO()
    pydicom.dcmwrite(target, held, enforce_file_format=True)
    return target.getvalue()


RAMP = np.linspace(0, 4000, 64).reshape(8, 8).astype(np.uint16)


def shown(data: bytes, **fields: Any) -> np.ndarray:
    return np.asarray(decode_dicom(data, **fields))


def test_window_of_the_file_is_applied() -> None:
    found = shown(dicom(RAMP, WindowCenter=2000, WindowWidth=1000))
    assert (found[RAMP < 1490] == 0).all()
    assert (found[RAMP > 2510] == 255).all()
    middle = found[(RAMP > 1900) & (RAMP < 2100)]
    assert ((middle > 95) & (middle < 160)).all()


def test_window_of_the_study_replaces_it_in_rescaled_units() -> None:
    hounsfield = (RAMP.astype(np.int16) - 1000) // 2
    data = dicom(hounsfield, RescaleSlope=2, RescaleIntercept=0, WindowCenter=5, WindowWidth=1)
    found = shown(data, window=(0.0, 1000.0))
    expected = np.round((2.0 * hounsfield / 1000).clip(0, 1) * 255)
    assert np.abs(found - expected).max() <= 1


def test_without_a_window_the_full_range_is_used() -> None:
    found = shown(dicom(RAMP + 100))
    assert (found.min(), found.max()) == (0, 255)
    assert (np.diff(found.ravel().astype(int)) >= 0).all()


def test_monochrome1_is_inverted() -> None:
    plain = shown(dicom(RAMP))
    turned = shown(dicom(RAMP, PhotometricInterpretation="MONOCHROME1"))
    assert (turned == 255 - plain).all()


def test_colour_and_the_first_frame_are_read() -> None:
    colour = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    assert (shown(dicom(colour)) == colour).all()
    frames = np.stack([RAMP, RAMP.T])
    data = dicom(frames.reshape(16, 8), Rows=8, NumberOfFrames=2, WindowCenter=2000,
                 WindowWidth=4000)  # fmt: skip
    assert shown(data).shape == (8, 8)
    assert (np.diff(shown(data).ravel().astype(int)) >= 0).all()


@pytest.mark.parametrize("cut", [140, 300, -40])
def test_truncated_files_are_set_aside_in_the_sandbox(cut: int) -> None:
    data = dicom(RAMP)
    with Sandbox(Preprocess(size=16)) as sandbox:
        with pytest.raises(Rejected, match="not_decodable"):
            sandbox.decode(data[:cut], "a.dcm")
        assert sandbox.decode(data, "a.dcm").width == 8


def test_wrong_names_and_sizes_are_rejected() -> None:
    with pytest.raises(Rejected, match="wrong_extension"):
        decode(dicom(RAMP), "a.png")
    with pytest.raises(Rejected, match="format_not_allowed"):
        decode(b"nothing of the kind" * 20, "a.dcm")
    with pytest.raises(Rejected, match="too_large"):
        decode(dicom(RAMP, NumberOfFrames=2_000_000), "a.dcm")


def test_16_bit_images_use_the_window_of_the_study() -> None:
    target = io.BytesIO()
    Image.fromarray(RAMP).save(target, "PNG")
    found = np.asarray(decode(target.getvalue(), "a.png", window=(1000, 3000)))
    expected = np.round(((RAMP - 1000.0) / 2000).clip(0, 1) * 255)
    assert (found == expected).all()
    plain = np.asarray(decode(target.getvalue(), "a.png"))
    assert (plain == RAMP >> 8).all()


def test_window_has_two_ends() -> None:
    with pytest.raises(ValueError, match="the second value must be the greater"):
        Preprocess(size=16, window=(5, 5))


def test_patient_id_is_hashed() -> None:
    first, same, other = (
        read_header(dicom(RAMP, PatientID=name, BurnedInAnnotation="NO"))
        for name in ("Doe^1", "Doe^1 ", "Doe^2")
    )
    assert first == same != other
    assert "Doe" not in str(first)
    assert first["burned_in"] == "NO"
    assert read_header(dicom(RAMP)) == {"patient": "", "burned_in": ""}


@pytest.mark.parametrize(
    "tags",
    [
        {"RescaleSlope": -1, "RescaleIntercept": 4000},
        {"RescaleSlope": 2, "RescaleIntercept": -100},
        {"VOILUTFunction": "LINEAR_EXACT"},
        {"VOILUTFunction": "SIGMOID"},
    ],
)
def test_windows_apply_to_rescaled_values(tags: dict[str, Any]) -> None:
    slope, intercept = tags.get("RescaleSlope", 1), tags.get("RescaleIntercept", 0)
    values = RAMP * float(slope) + intercept
    found = shown(dicom(RAMP, WindowCenter=2000, WindowWidth=1000, **tags)).astype(int)
    bright, dark = found[values > 2600], found[values < 1400]
    assert bright.min() > 225
    assert dark.max() < 30
    assert abs(int(np.interp(2000, np.sort(values.ravel()), np.sort(found.ravel()))) - 127) < 25


def test_compressed_header_is_not_decompressed() -> None:
    head = dicom(RAMP, PatientID="p").replace(b"1.2.840.10008.1.2.1\x00", b"1.2.840.10008.1.2.1.99")
    assert read_header(head) == {"patient": "", "burned_in": ""}
