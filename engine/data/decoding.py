"""Safe decoding of foreign images to 8-bit grey or RGB.

CMYK, YCbCr, LAB       converted to RGB by Pillow
palette, any alpha     composited over white
16-bit integers        by the study's `window`, or the upper 8 bits
DICOM                  by the study's `window`, or the file's own (`engine.data.dicom`)
floats                 0..1 times 255; values outside are refused, as are NaN and infinity
EXIF orientation       applied; EXIF, GPS, profiles and text are dropped, except the device's name
animations, pages      the first frame
"""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from pathlib import PurePosixPath

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from engine.data.dicom import decode_dicom
from engine.data.images import (
    EXTENSIONS,
    FOREIGN,
    MAX_BYTES,
    MAX_PIXELS,
    Rejected,
    windowed,
)

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM")
# Formats that differ from another one in their head alone. Many cameras write MPO: a JPEG followed
# by a second picture.
_SAME_FORMAT = {"MPO": "JPEG", "DIB": "BMP"}
# Bytes of a text or a colour profile in a PNG, such as a scanner's protocol; they are dropped.
_MOST_TEXT = 16 * 2**20
# Formats that Pillow or a browser may read but that are not images of a dataset: programs, vector
# graphics, stacks.
_REFUSED_HEADS = {
    b"%!PS": "EPS", b"\xc5\xd0\xd3\xc6": "EPS", b"%PDF": "PDF", b"8BPS": "PSD",
    b"SIMPLE": "FITS", b"<svg": "SVG",
}  # fmt: skip

# Brands in the head of phones' photographs, which are often renamed to .jpg.
_HEIF = {b"heic": "HEIC", b"heix": "HEIC", b"hevc": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF",
         b"avif": "AVIF", b"avis": "AVIF"}  # fmt: skip


def decode(
    data: bytes,
    uri: str = "",
    *,
    check_extension: bool = True,
    window: tuple[float, float] | None = None,
) -> Image.Image:
    """Decode foreign bytes to mode L or RGB. Run it in a `Sandbox`.

    In `info`: `acquisition`, what `acquisition_of` gives; `frames`, the number of frames or pages;
    `bits`, if the upper 8 of 16 bits were taken, how many bits the values use.

    check_extension: refuse a file whose extension contradicts its format. window:
    `Preprocess.window`. Raises `Rejected` with a reason.
    """
    if not data:
        raise Rejected("empty")
    if len(data) > MAX_BYTES:
        raise Rejected("too_large", f"{len(data):,} bytes")
    suffix = PurePosixPath(uri).suffix.lower()
    if data[128:132] == b"DICM":  # after a preamble of 128 bytes
        if check_extension and suffix in EXTENSIONS:
            raise Rejected("wrong_extension", f"DICOM named {suffix}")
        return decode_dicom(data, window)
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF:
        raise Rejected(
            "format_not_allowed",
            f"{_HEIF[data[8:12]]} (the extension does not matter); convert it to JPEG",
        )
    if check_extension and suffix in FOREIGN:
        raise Rejected("format_not_allowed", suffix)
    head = data[:512].lstrip()
    for magic, name in _REFUSED_HEADS.items():
        if head.startswith(magic) or (name == "SVG" and b"<svg" in head):
            raise Rejected("format_not_allowed", name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.MAX_IMAGE_PIXELS = MAX_PIXELS
            PngImagePlugin.MAX_TEXT_CHUNK = _MOST_TEXT
            image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
            image.info.pop("bits", None)  # a text chunk of this name is not ours
            claimed = EXTENSIONS.get(suffix)
            image_format = image.format
            actual = _SAME_FORMAT.get(str(image_format), image_format)
            if check_extension and claimed and actual != claimed:
                raise Rejected("wrong_extension", f"{actual} named {PurePosixPath(uri).suffix}")
            frames = getattr(image, "n_frames", 1)
            if image.width * image.height * frames > MAX_PIXELS:
                raise Rejected("too_large", f"{image.width} x {image.height} x {frames}")
            image.load()
            acquisition = acquisition_of(image, actual)
            with suppress(Exception):  # damaged EXIF says nothing about the picture
                image = ImageOps.exif_transpose(image)
            decoded = _to_eight_bits(image, window)
            # The second picture of an MPO is a preview or a depth map.
            decoded.info |= {
                "acquisition": acquisition, "frames": 1 if image_format == "MPO" else frames,
            }  # fmt: skip
            return decoded
    except Rejected:
        raise
    except UnidentifiedImageError:  # its text names an object of Python
        raise Rejected("not_decodable", "no known image format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise Rejected("too_large", str(error)) from None
    except Exception as error:  # Pillow's decoders raise almost any exception on broken input
        bomb = any(words in str(error).lower() for words in ("too large", "too much memory"))
        reason = "too_large" if bomb else "not_decodable"
        raise Rejected(reason, f"{type(error).__name__}: {error}"[:200]) from None


def acquisition_of(image: Image.Image, file_format: str | None) -> dict[str, str]:
    """How a file was made: `format`, `mode` (colours and bits), `coding` (the JPEG quality as its
    sum of quantisation), `device` and `turned` (EXIF's orientation, if the picture must be turned
    upright), where they are known."""
    entries = {"format": file_format or "", "mode": image.mode}
    tables = getattr(image, "quantization", None)
    if tables:
        entries["coding"] = str(sum(next(iter(tables.values()))))
    with suppress(Exception):  # damaged EXIF
        exif = image.getexif()
        names = (str(exif.get(tag) or "") for tag in (ExifTags.Base.Make, ExifTags.Base.Model))
        entries["device"] = " ".join(name.strip("\0 ") for name in names).strip()[:80]
        if exif.get(ExifTags.Base.Orientation, 1) in range(2, 9):
            entries["turned"] = str(exif[ExifTags.Base.Orientation])
    return {name: value for name, value in entries.items() if value}


def _to_eight_bits(image: Image.Image, window: tuple[float, float] | None) -> Image.Image:
    # A PNG may declare one of its colours or greys transparent.
    if image.mode in ("L", "RGB", "1") and "transparency" not in image.info:
        return image.convert("L") if image.mode == "1" else image
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise Rejected("range", f"integers from {values.min()} to {values.max()}")
        if window:
            return Image.fromarray(windowed(values, window))
        upper = Image.fromarray((values >> 8).astype(np.uint8))
        upper.info["bits"] = int(values.max()).bit_length()
        return upper
    if image.mode == "F":
        floats = np.asarray(image)
        if not np.isfinite(floats).all():
            raise Rejected("not_finite")
        if floats.min() < 0 or floats.max() > 1:
            raise Rejected("range", f"floats from {floats.min():g} to {floats.max():g}, not 0 to 1")
        return Image.fromarray(np.round(floats * 255).astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
