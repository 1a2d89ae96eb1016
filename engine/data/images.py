"""Images: safe decoding, the one preprocessing, and the codec.

Real and synthetic images pass the same `Preprocess`; otherwise "blurry" or "JPEG" would come to
mean
"minority class". What a file is converted to:

    CMYK, YCbCr, LAB       to RGB by Pillow
    palette, any alpha     composited over white
    16-bit integers        by the study's `window`, or the upper 8 bits
    DICOM                  by the study's `window`, or the file's own (`engine.data.dicom`)
    floats                 0..1 times 255; anything outside is refused, as are NaN and infinity
    EXIF orientation       applied; EXIF, GPS, profiles and text are dropped
    animations, pages      the first frame
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin
from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from engine.core.spec import Spec

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
EXTENSIONS = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP",
    ".tif": "TIFF", ".tiff": "TIFF", ".gif": "GIF",
}  # fmt: skip
# Pictures and documents of other kinds: listed with the images, so that none is lost unseen.
FOREIGN = (
    ".avif", ".dcm", ".eps", ".fits", ".heic", ".heif", ".ico", ".jp2", ".pdf", ".ps", ".psd",
    ".svg", ".tga",
)  # fmt: skip
MAX_PIXELS = 50_000_000
MAX_BYTES = 256 * 2**20

# Formats that Pillow or a browser may read and that have no business in a dataset: programs,
# vectors, stacks.
_REFUSED_HEADS = {
    b"%!PS": "EPS", b"\xc5\xd0\xd3\xc6": "EPS", b"%PDF": "PDF", b"8BPS": "PSD",
    b"SIMPLE": "FITS", b"<svg": "SVG",
}  # fmt: skip

Codec = Literal["png", "jpeg", "webp"]


class Rejected(Exception):
    """An image that is not used; `reason` is a word for tables, the text says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class Preprocess(Spec):
    """What every image goes through, real or synthetic. `size` is the side of the square in
    pixels."""

    size: int = Field(ge=8, le=2048)
    channels: Literal["L", "RGB"] = "RGB"
    # crop: the centre square; pad: the whole picture on black; stretch: the aspect is lost.
    fit: Literal["crop", "pad", "stretch"] = "crop"
    resampling: Literal["bicubic", "lanczos", "bilinear", "nearest"] = "bicubic"
    # Of pictures with more than 8 bits, the values that become black and white: 16-bit PNG and
    # TIFF as stored, DICOM after its own rescaling. None: the upper 8 bits; of DICOM, as the file
    # says.
    window: tuple[float, float] | None = None
    codec: Codec = "png"
    quality: int = Field(default=95, ge=1, le=100)

    @field_validator("window")
    @classmethod
    def _rises(cls, window: tuple[float, float] | None) -> tuple[float, float] | None:
        if window is not None and not window[0] < window[1]:
            raise PydanticCustomError("explained", "window: the second value must be the greater")
        return window

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels of every image in the study."""
        return (self.size, self.size, 1 if self.channels == "L" else 3)


def decode(
    data: bytes,
    uri: str = "",
    *,
    check_extension: bool = True,
    window: tuple[float, float] | None = None,
) -> Image.Image:
    """Decode foreign bytes to mode L or RGB. Raises `Rejected` with a reason; run it in a
    `Sandbox`.

    window: `Preprocess.window`.
    """
    if not data:
        raise Rejected("empty")
    if len(data) > MAX_BYTES:
        raise Rejected("too_large", f"{len(data):,} bytes")
    suffix = PurePosixPath(uri).suffix.lower()
    if data[128:132] == b"DICM":
        from engine.data.dicom import decode_dicom

        if check_extension and suffix in EXTENSIONS:
            raise Rejected("wrong_extension", f"DICOM named {suffix}")
        return decode_dicom(data, window)
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
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            claimed = EXTENSIONS.get(PurePosixPath(uri).suffix.lower())
            # Many cameras write MPO: a JPEG with a second picture behind it.
            found = "JPEG" if image.format == "MPO" else image.format
            if check_extension and claimed and found != claimed:
                raise Rejected("wrong_extension", f"{found} named {PurePosixPath(uri).suffix}")
            frames = getattr(image, "n_frames", 1)
            if image.width * image.height * frames > MAX_PIXELS:
                raise Rejected("too_large", f"{image.width} x {image.height} x {frames}")
            image.load()
            image = ImageOps.exif_transpose(image)
            return _to_eight_bits(image, window)
    except Rejected:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise Rejected("too_large", str(error)) from None
    except (
        Exception
    ) as error:  # Pillow's decoders raise nearly every kind of exception on broken input
        bomb = any(words in str(error).lower() for words in ("too large", "too much memory"))
        reason = "too_large" if bomb else "not_decodable"
        raise Rejected(reason, f"{type(error).__name__}: {error}"[:200]) from None


def _to_eight_bits(image: Image.Image, window: tuple[float, float] | None) -> Image.Image:
    # A PNG may name one of its colours or greys transparent.
    if image.mode in ("L", "RGB", "1") and "transparency" not in image.info:
        return image.convert("L") if image.mode == "1" else image
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise Rejected("range", f"integers from {values.min()} to {values.max()}")
        return Image.fromarray(
            windowed(values, window) if window else (values >> 8).astype(np.uint8)
        )
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


def windowed(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Values to uint8: the window's ends and what lies beyond them are black and white."""
    low, high = window
    share = (np.asarray(values, dtype=np.float64) - low) / max(high - low, 1e-12)
    return np.asarray(np.round(share.clip(0, 1) * 255).astype(np.uint8))


def pixel_sha256(image: Image.Image) -> str:
    """Digest of the decoded pixels: equal for files that differ in metadata or packing alone, and
    for a grey picture whether it is stored as grey or as colour."""
    if image.mode == "RGB":
        red, green, blue = image.split()
        if red.tobytes() == green.tobytes() == blue.tobytes():
            image = red
    hasher = hashlib.sha256(f"{image.mode} {image.width} {image.height}".encode())
    hasher.update(image.tobytes())
    return hasher.hexdigest()


def perceptual_hash(image: Image.Image) -> str:
    """64 bits of a picture as hexadecimal text: alike pictures differ in few of them."""
    import imagehash

    return str(imagehash.phash(image))


def preprocess(image: Image.Image, spec: Preprocess) -> np.ndarray:
    """Bring a decoded image to the study's size and channels: uint8 of shape (size, size,
    channels)."""
    image = image.convert(spec.channels)
    resampling = Image.Resampling[spec.resampling.upper()]
    side = (spec.size, spec.size)
    if image.size != side:
        if spec.fit == "stretch":
            image = image.resize(side, resampling)
        elif spec.fit == "pad":
            image = ImageOps.pad(image, side, resampling)
        else:
            image = ImageOps.fit(image, side, resampling)
    return np.asarray(image).reshape(spec.shape)


def encode(
    pixels: np.ndarray, spec: Preprocess, metadata: Mapping[str, str] | None = None
) -> bytes:
    """Encode uint8 pixels (height, width, channels) by the study's codec.

    `metadata` marks generated files: PNG text chunks; the entry `xmp` is written as XMP in every
    codec.
    """
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    target = io.BytesIO()
    entries = dict(metadata or {})
    xmp = entries.pop("xmp", None)
    if spec.codec == "png":
        info = PngImagePlugin.PngInfo()
        for name, text in entries.items():
            info.add_text(name, text) if text.isascii() else info.add_itxt(name, text)
        if xmp:
            info.add_itxt("XML:com.adobe.xmp", xmp)
        image.save(target, "PNG", compress_level=1 if spec.size > 64 else 6, pnginfo=info)
    else:
        options: dict[str, Any] = {"xmp": xmp.encode()} if xmp else {}
        if spec.codec == "jpeg":
            subsampling = {"subsampling": 0} if spec.channels == "RGB" else {}
            options |= {"quality": spec.quality, **subsampling}
            if entries:
                options["comment"] = "\n".join(f"{name}={text}" for name, text in entries.items())
            image.save(target, "JPEG", **options)
        else:
            image.save(target, "WEBP", lossless=True, method=0, **options)
    return target.getvalue()


def grid(rows: Sequence[Sequence[np.ndarray]]) -> bytes:
    """A PNG of equally large uint8 images (height, width, channels) in rows, none of them
    altered."""
    height, width, channels = rows[0][0].shape
    most = max(len(row) for row in rows)
    sheet = np.zeros((len(rows) * height, most * width, channels), np.uint8)
    for number, row in enumerate(rows):
        for place, image in enumerate(row):
            sheet[number * height : (number + 1) * height, place * width : (place + 1) * width] = (
                image
            )
    target = io.BytesIO()
    Image.fromarray(sheet[..., 0] if channels == 1 else sheet).save(target, "PNG")
    return target.getvalue()


def decode_own(data: bytes) -> np.ndarray:
    """Decode an image that `encode` made: uint8 (height, width, channels)."""
    pixels = np.asarray(Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def extension(spec: Preprocess) -> str:
    return {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}[spec.codec]
