"""DICOM images to 8 bits: modality and window as the file says, or a window of the study's.

Needs pydicom (the extra `dicom`). Nothing of the header but the picture is kept; text burned into
the picture cannot be told and stays.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from engine.data.images import MAX_PIXELS, Rejected, windowed

_PREAMBLE = 128
_DEFLATED = b"1.2.840.10008.1.2.1.99"


def is_dicom(data: bytes) -> bool:
    return data[_PREAMBLE : _PREAMBLE + 4] == b"DICM"


def decode_dicom(data: bytes, window: tuple[float, float] | None = None) -> Image.Image:
    """The first frame, mode L or RGB. Raises `Rejected`.

    window: values that become black and white, after the file's own rescaling (Hounsfield units of
    a CT), in place of the file's first window. A file without one is shown from its least to its
    greatest value.
    """
    pydicom = _pydicom()
    try:
        held = pydicom.dcmread(io.BytesIO(data))
        rows, columns = int(held.Rows), int(held.Columns)
        frames = int(held.get("NumberOfFrames") or 1)
    except Exception as error:  # hostile files raise nearly everything
        raise Rejected("not_decodable", f"{type(error).__name__}: {error}"[:200]) from None
    if rows * columns * frames > MAX_PIXELS:
        raise Rejected("too_large", f"{columns} x {rows} x {frames}")
    try:
        return _shown(held, frames, window)
    except (Rejected, MemoryError):
        raise
    except Exception as error:  # and so do its decoders; a packed one may need a plugin
        raise Rejected("not_decodable", f"{type(error).__name__}: {error}"[:200]) from None


def _shown(held: Any, frames: int, window: tuple[float, float] | None) -> Image.Image:
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut

    pixels = np.asarray(held.pixel_array)
    if frames > 1:
        pixels = pixels[0]
    kind = str(held.get("PhotometricInterpretation", "MONOCHROME2"))
    if kind == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, held)
    if pixels.ndim == 3:
        if pixels.dtype != np.uint8:
            pixels = (pixels >> (8 * (pixels.dtype.itemsize - 1))).astype(np.uint8)
        return Image.fromarray(pixels[..., :3])
    values = np.asarray(apply_modality_lut(pixels, held), dtype=np.float64)
    grey = windowed(values, window) if window else _by_its_own_window(held, values)
    # MONOCHROME1 stores black as the greatest value.
    return Image.fromarray(255 - grey if kind == "MONOCHROME1" else grey)


def _by_its_own_window(held: Any, values: np.ndarray) -> np.ndarray:
    """The first window or table of the file (DICOM PS3.3, C.11.2), else all values."""
    from pydicom.pixels.processing import apply_voi_lut

    def first(name: str) -> float:
        value = held[name].value
        return float(value[0] if isinstance(value, Sequence) else value)

    if "WindowCenter" in held and "WindowWidth" in held:
        center, width = first("WindowCenter"), first("WindowWidth")
        function = str(held.get("VOILUTFunction") or "LINEAR")
        if function == "SIGMOID" and width > 0:
            exponent = (-4 * (values - center) / width).clip(-50, 50)
            return windowed(1 / (1 + np.exp(exponent)), (0.0, 1.0))
        if function == "LINEAR_EXACT" and width > 0:
            return windowed(values, (center - width / 2, center + width / 2))
        if width > 1:
            middle = center - 0.5
            return windowed(values, (middle - (width - 1) / 2, middle + (width - 1) / 2))
    elif "VOILUTSequence" in held:
        values = np.asarray(apply_voi_lut(values.astype(np.int64), held, index=0), np.float64)
    return windowed(values, (float(values.min()), float(values.max())))


def read_header(head: bytes) -> dict[str, str]:
    """Of a file's first bytes: `patient`, a hash of the patient's id (empty where there is none or
    it is packed), and `burned_in`: YES, NO or empty, as the file says of text in the picture.

    The hash keeps ids out of tables and pages; whoever knows the ids can find them again. Raises
    `Rejected`.
    """
    pydicom = _pydicom()
    # A packed header is not unpacked here: a megabyte of it may become a gigabyte.
    if _DEFLATED in head[:4096]:
        return {"patient": "", "burned_in": ""}
    try:
        held = pydicom.dcmread(
            io.BytesIO(head), stop_before_pixels=True,
            specific_tags=["PatientID", "BurnedInAnnotation"],
        )  # fmt: skip
        patient = str(held.get("PatientID") or "").strip()
        burned = str(held.get("BurnedInAnnotation") or "").strip().upper()
    except Exception as error:
        raise Rejected("not_decodable", f"{type(error).__name__}: {error}"[:200]) from None
    return {"patient": patient_hash(patient) if patient else "", "burned_in": burned}


def patient_hash(patient: str) -> str:
    """What stands for a patient's id in tables."""
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
