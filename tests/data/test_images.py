"""Preprocessing, the codec, and digests of pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from engine.data.decoding import decode
from engine.data.images import Preprocess, decode_own, encode, pixel_sha256, preprocess
from tests.data.test_decoding import PICTURE, saved


def test_equal_pixels_have_equal_digests_in_any_file_format() -> None:
    info = PngInfo()
    info.add_text("Comment", "somewhere else")
    files = [saved(PICTURE), saved(PICTURE, pnginfo=info, compress_level=0), saved(PICTURE, "BMP")]
    assert len({pixel_sha256(decode(data)) for data in files}) == 1
    other = PICTURE.copy()
    other.putpixel((0, 0), (1, 2, 3))
    turned = PICTURE.transpose(Image.Transpose.ROTATE_90)
    digests = {pixel_sha256(image) for image in (PICTURE, other, turned, PICTURE.convert("L"))}
    assert len(digests) == 4


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_fit_crops_pads_or_stretches_a_wide_image(fit: Any) -> None:
    wide = Image.new("RGB", (60, 20), "white")
    wide.paste("red", (0, 0, 20, 20))
    found = preprocess(wide, Preprocess(size=12, fit=fit, resampling="nearest"))
    assert found.shape == (12, 12, 3)
    assert found.dtype == np.uint8
    assert found[6, 0].tolist() == {
        "crop": [255, 255, 255], "pad": [255, 0, 0], "stretch": [255, 0, 0]
    }[fit]  # fmt: skip
    assert found[0, 6].tolist() == ([0, 0, 0] if fit == "pad" else [255, 255, 255])


@pytest.mark.parametrize("channels", ["L", "RGB"])
@pytest.mark.parametrize("codec", ["png", "jpeg", "webp"])
def test_codec_round_trips(codec: Any, channels: Any) -> None:
    spec = Preprocess(size=32, channels=channels, codec=codec)
    pixels = preprocess(Image.radial_gradient("L").convert("RGB"), spec)
    found = decode_own(encode(pixels, spec))
    if codec == "webp" and channels == "L":  # WebP has no greyscale
        found = found[..., :1]
    assert found.shape == spec.shape
    tolerance = 0 if codec != "jpeg" else 12
    assert np.abs(found.astype(int) - pixels.astype(int)).max() <= tolerance


def test_generated_files_are_marked_in_every_codec() -> None:
    for codec in ("png", "jpeg", "webp"):
        spec = Preprocess(size=16, codec=codec)
        data = encode(np.zeros(spec.shape, np.uint8), spec, {"xmp": "<x>made</x>"})
        assert b"<x>made</x>" in data


def test_original_metadata_is_dropped() -> None:
    exif = Image.Exif()
    exif[0x010F] = "Secret Camera"
    info = PngInfo()
    info.add_text("Patient", "Secret Name")
    for data in (saved(PICTURE, "JPEG", exif=exif), saved(PICTURE, pnginfo=info, exif=exif)):
        for codec in ("png", "jpeg", "webp"):
            spec = Preprocess(size=16, codec=codec)
            assert b"Secret" not in encode(preprocess(decode(data), spec), spec)
