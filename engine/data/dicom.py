"""DICOM images to 8 bits, by the modality and window of the file or by a window of the study.

Needs pydicom (the extra `dicom`). Only the picture is kept, not the header; text burned into the
picture stays, because it cannot be detected.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from engine.data.images import MAX_PIXELS, Rejected, windowed

_DEFLATED = b"1.2.840.10008.1.2.1.99"


def decode_dicom(data: bytes, window: tuple[float, float] | None = None) -> Image.Image:
    """The first frame, mode L or RGB. Raises `Rejected`.

    window: the values that become black and white after the file's own rescaling (Hounsfield units
    for CT); replaces the file's first window. Without any window, the full range of values is used.
    """
    pydicom = _pydicom()
    try:
        dataset = pydicom.dcmread(io.BytesIO(data))
        rows, columns = int(dataset.Rows), int(dataset.Columns)
        frames = int(dataset.get("NumberOfFrames") or 1)
    except Exception as error:  # hostile files raise almost any exception
        raise Rejected("not_decodable", f"{type(error).__name__}: {error}"[:200]) from None
    if rows * columns * frames > MAX_PIXELS:
        raise Rejected("too_large", f"{columns} x {rows} x {frames}")
    try:
        image = _rendered(dataset, frames, window)
        image.info |= {"acquisition": acquisition_of(dataset), "frames": frames}
        return image
    except (Rejected, MemoryError):
        raise
    except Exception as error:  # so do decoders; a compressed file may need a missing one
        raise Rejected("not_decodable", f"{type(error).__name__}: {error}"[:200]) from None


def acquisition_of(dataset: Any) -> dict[str, str]:
    """As `engine.data.decoding.acquisition_of`, of a DICOM dataset."""
    names = (str(dataset.get(name) or "") for name in ("Manufacturer", "ManufacturerModelName"))
    mode = f"{dataset.get('PhotometricInterpretation', '')} {dataset.get('BitsStored', '')}".strip()
    entries = {"format": "DICOM", "mode": mode, "device": " ".join(names).strip()[:80]}
    return {name: value for name, value in entries.items() if value}


def _rendered(dataset: Any, frames: int, window: tuple[float, float] | None) -> Image.Image:
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut

    pixels = np.asarray(dataset.pixel_array)
    if frames > 1:
        pixels = pixels[0]
    kind = str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
    if kind == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
    if pixels.ndim == 3:
        if pixels.dtype != np.uint8:
            pixels = (pixels >> (8 * (pixels.dtype.itemsize - 1))).astype(np.uint8)
        return Image.fromarray(pixels[..., :3])
    values = np.asarray(apply_modality_lut(pixels, dataset), dtype=np.float64)
    grey = windowed(values, window) if window else _by_file_window(dataset, values)
    # In MONOCHROME1 the greatest value is black.
    return Image.fromarray(255 - grey if kind == "MONOCHROME1" else grey)


def _by_file_window(dataset: Any, values: np.ndarray) -> np.ndarray:
    """Values to uint8 by the file's first window or lookup table (DICOM PS3.3, C.11.2), else over
    their full range."""
    from pydicom.pixels.processing import apply_voi_lut

    def first(name: str) -> float:
        value = dataset[name].value
        return float(value[0] if isinstance(value, Sequence) else value)

    if "WindowCenter" in dataset and "WindowWidth" in dataset:
        center, width = first("WindowCenter"), first("WindowWidth")
        function = str(dataset.get("VOILUTFunction") or "LINEAR")
        if function == "SIGMOID" and width > 0:
            exponent = (-4 * (values - center) / width).clip(-50, 50)
            return windowed(1 / (1 + np.exp(exponent)), (0.0, 1.0))
        if function == "LINEAR_EXACT" and width > 0:
            return windowed(values, (center - width / 2, center + width / 2))
        if width > 1:
            middle = center - 0.5
            return windowed(values, (middle - (width - 1) / 2, middle + (width - 1) / 2))
    elif "VOILUTSequence" in dataset:
        values = np.asarray(apply_voi_lut(values.astype(np.int64), dataset, index=0), np.float64)
    return windowed(values, (float(values.min()), float(values.max())))


def read_header(head: bytes) -> dict[str, str]:
    """Header fields from the first bytes of a file.

    patient: a hash of the patient id; empty if it is missing or the header is compressed.
    burned_in: what the file says about text in the picture: YES, NO or empty. The hash keeps ids
    out of tables and pages, but anyone who knows an id can compute its hash. Raises `Rejected`.
    """
    pydicom = _pydicom()
    # A compressed header is not read: a megabyte may expand to a gigabyte.
    if _DEFLATED in head[:4096]:
        return {"patient": "", "burned_in": ""}
    try:
        dataset = pydicom.dcmread(
            io.BytesIO(head), stop_before_pixels=True,
            specific_tags=["PatientID", "BurnedInAnnotation"],
        )  # fmt: skip
        patient = str(dataset.get("PatientID") or "").strip()
        burned = str(dataset.get("BurnedInAnnotation") or "").strip().upper()
    except Exception as error:
        raise Rejected("not_decodable", f"{type(error).__name__}: {error}"[:200]) from None
    return {"patient": patient_hash(patient) if patient else "", "burned_in": burned}


def patient_hash(patient: str) -> str:
    """The hash that replaces a patient id in tables."""
    return hashlib.sha256(f"patient {patient}".encode()).hexdigest()[:16]


def _pydicom() -> Any:
    try:
        import pydicom
    except ImportError:
        raise Rejected(
            "format_not_allowed",
            'DICOM needs pydicom: pip install "synthetic-training-engine[dicom]"',
        ) from None
    return pydicom
