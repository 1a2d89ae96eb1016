"""DICOM images to 8 bits: modality and window as the file says, or a window of the study's.

Needs pydicom (the extra `dicom`). Nothing of the header but the picture is kept; text burned into
the picture cannot be told and stays.
"""

from __future__ import annotations

import hashlib
import io
from typing import IO, Any

import numpy as np
from PIL import Image

from engine.core.images import MAX_PIXELS, Rejected, windowed

_PREAMBLE = 128


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
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut

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
    if window is None:
        width = held.get("WindowWidth")
        if width is not None or "VOILUTSequence" in held:
            values = np.asarray(apply_voi_lut(values, held, index=0), dtype=np.float64)
            window = _output_range(held, values)
        else:
            window = (float(values.min()), float(values.max()))
    grey = windowed(values, window)
    # MONOCHROME1 stores black as the greatest value.
    return Image.fromarray(255 - grey if kind == "MONOCHROME1" else grey)


def _output_range(held: Any, values: np.ndarray) -> tuple[float, float]:
    """What black and white are after pydicom's windowing: it stretches to the range of the stored
    bits, rescaled."""
    if "VOILUTSequence" in held:
        return float(values.min()), float(values.max())
    bits, signed = int(held.BitsStored), int(held.get("PixelRepresentation", 0))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    slope = float(held.get("RescaleSlope") or 1)
    intercept = float(held.get("RescaleIntercept") or 0)
    return low * slope + intercept, high * slope + intercept


def read_header(file: IO[bytes]) -> dict[str, str]:
    """`patient`, a hash of the patient's id (empty where there is none), and `burned_in`: YES, NO
    or empty, as the file says of text in the picture.

    The hash keeps ids out of tables and pages; whoever knows the ids can find them again. Raises
    `Rejected`.
    """
    pydicom = _pydicom()
    try:
        held = pydicom.dcmread(
            file, stop_before_pixels=True,
            specific_tags=["PatientID", "BurnedInAnnotation"],
        )  # fmt: skip
        patient = str(held.get("PatientID") or "").strip()
        burned = str(held.get("BurnedInAnnotation") or "").strip().upper()
    except Exception as error:
        raise Rejected("not_decodable", f"{type(error).__name__}: {error}"[:200]) from None
    hashed = hashlib.sha256(f"patient {patient}".encode()).hexdigest()[:16] if patient else ""
    return {"patient": hashed, "burned_in": burned}


def _pydicom() -> Any:
    try:
        import pydicom
    except ImportError:
        raise Rejected(
            "format_not_allowed",
            'DICOM needs pydicom: pip install "synthetic-training-engine[dicom]"',
        ) from None
    return pydicom
