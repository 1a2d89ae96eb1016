"""Foreign images: which files are rejected and why, and how a file is converted."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from engine.data.decoding import decode
from engine.data.images import Rejected


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_with(
    *chunks: bytes, width: int = 8, height: int = 8, behind: tuple[bytes, ...] = ()
) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(9 * 8)))
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", head), *chunks, pixels, *behind, chunk(b"IEND", b"")]
    )


def zeros(count: int) -> bytes:
    return zlib.compress(bytes(count), 9)


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
TEXT_BOMB = chunk(b"zTXt", b"Comment\0\0" + zeros(80 * 2**20))
INTERNATIONAL_BOMB = chunk(b"iTXt", b"Comment\0\1\0\0\0" + zeros(80 * 2**20))
PROFILE_BOMB = chunk(b"iCCP", b"profile\0\0" + zeros(80 * 2**20))
ANIMATION = saved(
    Image.new("P", (2000, 2000)), "GIF", save_all=True, duration=[10] * 14,
    append_images=[Image.new("P", (2000, 2000), number + 1) for number in range(13)],
)  # fmt: skip
STACK = saved(
    Image.new("1", (4000, 4000)), "TIFF", save_all=True, compression="group4",
    append_images=[Image.new("1", (4000, 4000))] * 3,
)  # fmt: skip

HOSTILE = {
    "empty": (b"", "a.png", "empty"),
    "html_as_jpg": (b"<!DOCTYPE html><html>404</html>", "a.jpg", "not_decodable"),
    "text": (b"nothing at all", "a.png", "not_decodable"),
    "truncated_png": (saved(PICTURE)[:-600], "a.png", "not_decodable"),
    "truncated_jpeg": (saved(PICTURE, "JPEG")[:700], "a.jpg", "not_decodable"),
    "head_of_a_png": (saved(PICTURE)[:20], "a.png", "not_decodable"),
    "png_as_jpg": (saved(PICTURE), "a.jpg", "wrong_extension"),
    "jpeg_as_tiff": (saved(PICTURE, "JPEG"), "A.TIFF", "wrong_extension"),
    "51_megapixels": (png_with(width=51_000_000, height=1), "a.png", "too_large"),
    "500_megapixels_high": (png_with(width=1, height=500_000_000), "a.png", "too_large"),
    "9_gigapixels": (png_with(width=95_000, height=95_000), "a.png", "too_large"),
    "text_bomb": (png_with(TEXT_BOMB), "a.png", "too_large"),
    "text_bomb_behind_the_pixels": (png_with(behind=(TEXT_BOMB,)), "a.png", "too_large"),
    "international_text_bomb": (png_with(INTERNATIONAL_BOMB), "a.png", "too_large"),
    "many_text_chunks": (
        png_with(*[chunk(b"zTXt", b"a%d\0\0" % n + zeros(2**20)) for n in range(80)]),
        "a.png",
        "too_large",
    ),
    "profile_bomb": (png_with(PROFILE_BOMB), "a.png", "too_large"),
    "animation": (ANIMATION, "a.gif", "too_large"),
    "stack_of_pages": (STACK, "a.tiff", "too_large"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a.png", "format_not_allowed"),
    "eps_binary": (b"\xc5\xd0\xd3\xc6" + bytes(40), "a.png", "format_not_allowed"),
    "pdf": (saved(PICTURE, "PDF"), "a.jpg", "format_not_allowed"),
    "psd": (b"8BPS\0\1" + bytes(60), "a.png", "format_not_allowed"),
    "fits": (b"SIMPLE  =                    T" + bytes(60), "a.tif", "format_not_allowed"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "a.png", "format_not_allowed"),
    "svg_after_a_prolog": (b'\n<?xml version="1.0"?>\n<svg/>', "a.png", "format_not_allowed"),
    "icns_behind_pillow": (saved(PICTURE.resize((32, 32)), "ICNS"), "a.png", "not_decodable"),
    "ppm": (saved(PICTURE, "PPM"), "a.png", "wrong_extension"),
    "float_nan": (
        saved(Image.fromarray(np.array([[0, np.nan]], np.float32)), "TIFF"),
        "a.tif",
        "not_finite",
    ),
    "float_infinite": (
        saved(Image.fromarray(np.array([[0, np.inf]], np.float32)), "TIFF"),
        "a.tif",
        "not_finite",
    ),
    "float_out_of_range": (
        saved(Image.fromarray(np.array([[0, 255]], np.float32)), "TIFF"),
        "a.tif",
        "range",
    ),
    "integers_out_of_range": (
        saved(Image.fromarray(np.array([[0, 70_000]], np.int32)), "TIFF"),
        "a.tif",
        "range",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_rejected_with_its_reason(name: str) -> None:
    data, uri, reason = HOSTILE[name]
    with pytest.raises(Rejected) as caught:
        decode(data, uri)
    assert caught.value.reason == reason, str(caught.value)


@pytest.mark.parametrize("limit_for", ["text_bomb", "profile_bomb"])
def test_small_text_and_profile_chunks_are_accepted(limit_for: str) -> None:
    # The files above are rejected for their payload, not because the test writes broken ones.
    name = {"text_bomb": b"zTXt", "profile_bomb": b"iCCP"}[limit_for]
    assert decode(png_with(chunk(name, b"name\0\0" + zeros(1000))), "a.png").size == (8, 8)


def test_wrong_extension_is_accepted_if_the_study_says_so() -> None:
    assert decode(saved(PICTURE), "a.jpg", check_extension=False).size == PICTURE.size
    assert decode(saved(PICTURE), "no_extension").size == PICTURE.size


def outcome(data: bytes) -> str:
    try:
        return decode(data).mode
    except Rejected as rejected:
        return rejected.reason


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of broken TIFF tags
def test_mutated_file_is_decoded_or_rejected() -> None:
    known = {"L", "RGB", "not_decodable", "too_large", "range", "not_finite", "format_not_allowed"}
    random = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"):
        data = saved(PICTURE.convert("P") if kind == "GIF" else PICTURE, kind)
        for _ in range(60):
            mutant = bytearray(data)
            for place in random.integers(0, len(data), 4):
                mutant[place] = random.integers(256)
            assert outcome(bytes(mutant)) in known


def test_cmyk_becomes_rgb() -> None:
    image = decode(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), "a.jpg")
    assert image.mode == "RGB"
    red, green, blue = image.getpixel((4, 4))  # type: ignore[misc]
    assert red > 200
    assert green < 60
    assert blue < 60


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_images_keep_the_upper_eight_bits(kind: str) -> None:
    values = np.array([[0, 255, 256, 0x7FFF, 0xFFFF]], np.uint16)
    image = decode(saved(Image.fromarray(values), kind))
    assert np.asarray(image).tolist() == [[0, 0, 1, 127, 255]]
    assert image.mode == "L"


@pytest.mark.parametrize(("most", "bits"), [(4095, 12), (65535, 16), (255, 8)])
def test_bits_that_16_bit_images_use_are_reported(most: int, bits: int) -> None:
    values = np.array([[0, most // 2, most]], np.uint16)
    assert decode(saved(Image.fromarray(values), "PNG")).info["bits"] == bits
    assert "bits" not in decode(saved(Image.fromarray(values), "PNG"), window=(0, most)).info


def test_long_text_and_damaged_exif_cost_no_image() -> None:
    text = zlib.compress(b"a scanner's protocol " * 100_000)
    assert decode(png_with(chunk(b"zTXt", b"protocol\0\0" + text)), "a.png").size == (8, 8)
    damaged = chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff\x01\x12 cut short")
    assert decode(png_with(damaged), "a.png").size == (8, 8)


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".pgm", ".ppm", ".dib"])
def test_less_common_extensions_are_read(suffix: str) -> None:
    kind = {".pgm": "PPM", ".ppm": "PPM", ".dib": "DIB"}.get(suffix, "JPEG")
    image = Image.new("L" if suffix == ".pgm" else "RGB", (8, 8))
    assert decode(saved(image, kind), f"a{suffix}").size == (8, 8)


def test_floats_from_zero_to_one_fill_the_byte() -> None:
    values = np.array([[0, 0.25, 1]], np.float32)
    assert np.asarray(decode(saved(Image.fromarray(values), "TIFF"))).tolist() == [[0, 64, 255]]


def test_one_bit_becomes_grey() -> None:
    image = decode(saved(Image.fromarray(np.array([[True, False]]))))
    assert (image.mode, np.asarray(image).tolist()) == ("L", [[255, 0]])


def palette_with_alpha() -> bytes:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 1)
    return saved(image, transparency=bytes([0, 255]))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(palette_with_alpha(), id="palette"),
        pytest.param(saved(Image.new("RGBA", (4, 4), (255, 0, 0, 0))), id="rgba"),
        pytest.param(saved(Image.new("LA", (4, 4), (9, 0))), id="grey_alpha"),
        pytest.param(
            saved(Image.new("RGB", (4, 4), "red"), transparency=(255, 0, 0)), id="one_colour"
        ),
        pytest.param(saved(Image.new("L", (4, 4), 9), transparency=9), id="one_grey"),
        pytest.param(saved(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "WEBP"), id="webp"),
        pytest.param(saved(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "GIF"), id="gif"),
    ],
)
def test_transparent_pixels_become_white(data: bytes) -> None:
    image = decode(data)
    assert image.mode == "RGB"
    assert image.getpixel((3, 3)) == (255, 255, 255)


def test_half_transparent_pixels_are_blended_with_white() -> None:
    image = decode(saved(Image.new("RGBA", (4, 4), (0, 0, 0, 128))))
    assert image.getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize(("orientation", "corner"), [(1, "red"), (3, "blue"), (6, "lime")])
def test_exif_orientation_is_applied(orientation: int, corner: str) -> None:
    picture = Image.new("RGB", (30, 20), "white")
    picture.paste("red", (0, 0, 10, 10))
    picture.paste("lime", (0, 10, 10, 20))
    picture.paste("blue", (20, 10, 30, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(saved(picture, exif=exif), "a.png")
    assert image.size == ((20, 30) if orientation == 6 else (30, 20))
    turned = None if orientation == 1 else str(orientation)
    assert image.info["acquisition"].get("turned") == turned
    assert image.getpixel((2, 2)) == Image.new("RGB", (1, 1), corner).getpixel((0, 0))


def test_camera_jpeg_with_a_second_image_is_a_jpeg() -> None:
    data = saved(PICTURE, "MPO", save_all=True, append_images=[PICTURE.rotate(180)])
    assert decode(data, "a.jpg").size == PICTURE.size


def test_first_frame_of_an_animation_is_used() -> None:
    data = saved(Image.new("RGB", (9, 9), "red"), "GIF", save_all=True, duration=9,
                 append_images=[Image.new("RGB", (9, 9), "blue")])  # fmt: skip
    assert decode(data, "a.gif").convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def test_how_a_file_was_made_is_kept() -> None:
    image = Image.fromarray(np.zeros((9, 9, 3), np.uint8))
    exif = image.getexif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.Model] = "Maker", "Model 3"
    codings = []
    for quality in (30, 90):
        made = decode(saved(image, "JPEG", quality=quality, exif=exif)).info["acquisition"]
        codings.append(int(made.pop("coding")))
        assert made == {"format": "JPEG", "mode": "RGB", "device": "Maker Model 3"}
    assert codings[0] > codings[1]
    made = decode(saved(image.convert("L"))).info["acquisition"]
    assert made == {"format": "PNG", "mode": "L"}


def test_frames_are_counted() -> None:
    page = Image.fromarray(np.zeros((9, 9), np.uint8))
    data = saved(page, "TIFF", save_all=True, append_images=[page, page])
    assert decode(data).info["frames"] == 3
    assert decode(saved(page)).info["frames"] == 1


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"avif"])
def test_photographs_of_phones_are_named_whatever_their_extension(brand: bytes) -> None:
    with pytest.raises(Rejected, match=r"format_not_allowed: (HEIC|HEIF|AVIF) .the extension"):
        decode(b"\0\0\0\x18ftyp" + brand + bytes(500), "a/photo.jpg")
