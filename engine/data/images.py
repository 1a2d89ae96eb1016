"""Images: the common preprocessing, the codec, and digests of pixels.

Real and synthetic images pass the same `Preprocess`; otherwise a classifier could learn that blur
or JPEG artefacts mean a minority class.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin
from pydantic import Field, field_validator

from engine.core.spec import Spec, explained

EXTENSIONS = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP",
    ".tif": "TIFF", ".tiff": "TIFF", ".gif": "GIF", ".jfif": "JPEG", ".jpe": "JPEG",
    ".jif": "JPEG", ".dib": "BMP", ".apng": "PNG", ".pbm": "PPM", ".pgm": "PPM", ".ppm": "PPM",
    ".pnm": "PPM",
}  # fmt: skip
# Other kinds of pictures and documents: readers list them, so that each is reported as refused.
FOREIGN = (
    ".avif", ".dcm", ".eps", ".fits", ".heic", ".heif", ".ico", ".jp2", ".pdf", ".ps", ".psd",
    ".svg", ".tga",
)  # fmt: skip
MAX_PIXELS = 50_000_000
MAX_BYTES = 256 * 2**20

Codec = Literal["png", "jpeg", "webp"]


class Rejected(Exception):
    """An image that cannot be used. `reason` is one word for tables; the text has both."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class Preprocess(Spec):
    """The preprocessing of all images, real and synthetic.

    size: side of the square in pixels.
    """

    size: int = Field(ge=8, le=2048)
    channels: Literal["L", "RGB"] = "RGB"
    # crop: the centre square. pad: the whole picture on black. stretch: the aspect ratio is lost.
    fit: Literal["crop", "pad", "stretch"] = "crop"
    resampling: Literal["bicubic", "lanczos", "bilinear", "nearest"] = "bicubic"
    # For pictures with more than 8 bits, the values that become black and white: 16-bit PNG and
    # TIFF as stored, DICOM after its own rescaling. None: the upper 8 bits; for DICOM, the window
    # of the file.
    window: tuple[float, float] | None = None
    codec: Codec = "png"
    quality: int = Field(default=95, ge=1, le=100)

    @field_validator("window")
    @classmethod
    def _rises(cls, window: tuple[float, float] | None) -> tuple[float, float] | None:
        if window is not None and not window[0] < window[1]:
            raise explained("window: the second value must be the greater")
        return window

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels of every image in the study."""
        return (self.size, self.size, 1 if self.channels == "L" else 3)


def windowed(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Values to uint8. The lower end of the window and below are black, the upper end and above
    white."""
    low, high = window
    share = (np.asarray(values, dtype=np.float64) - low) / max(high - low, 1e-12)
    return np.asarray(np.round(share.clip(0, 1) * 255).astype(np.uint8))


def pixel_sha256(image: Image.Image) -> str:
    """Digest of the decoded pixels.

    Equal for files that differ only in metadata or compression, and for a grey picture stored as
    grey or as colour.
    """
    if image.mode == "RGB":
        red, green, blue = image.split()
        if red.tobytes() == green.tobytes() == blue.tobytes():
            image = red
    hasher = hashlib.sha256(f"{image.mode} {image.width} {image.height}".encode())
    hasher.update(image.tobytes())
    return hasher.hexdigest()


def perceptual_hash(image: Image.Image) -> str:
    """A 64-bit perceptual hash as hexadecimal text; similar pictures differ in few bits."""
    import imagehash

    return str(imagehash.phash(image))


def preprocess(image: Image.Image, spec: Preprocess) -> np.ndarray:
    """A decoded image at the study's size and channels, uint8 (size, size, channels)."""
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
    """Encode uint8 pixels (height, width, channels) with the study's codec.

    metadata: marks of generated files, written as PNG text chunks or a JPEG comment; the entry
    `xmp` is written as XMP with every codec.
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
    """A PNG of uint8 images (height, width, channels) of equal shape, in rows."""
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
    """Decode an image from `encode`, uint8 (height, width, channels)."""
    pixels = np.asarray(Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def extension(spec: Preprocess) -> str:
    """The file extension of the study's codec."""
    return {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}[spec.codec]
