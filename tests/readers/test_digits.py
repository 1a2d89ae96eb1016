from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from engine.core import rows
from engine.data.decoding import decode
from engine.data.images import Rejected
from engine.readers.digits import Digits, DigitsSpec


def test_every_scan_is_listed_once_with_its_digit() -> None:
    reader = Digits(DigitsSpec())
    records = reader.records()
    assert records.schema == rows.records_schema(reader.tasks())
    assert records.num_rows == 1797 == len(set(records[rows.IMAGE_ID].to_pylist()))
    assert set(records["label.class"].to_pylist()) == set("0123456789")
    assert records[rows.SPLIT].null_count == records[rows.GROUP_ID].null_count == 1797


def test_scan_is_a_png_with_the_original_grey_levels() -> None:
    from sklearn.datasets import load_digits

    source = pickle.loads(pickle.dumps(Digits(DigitsSpec()).bytes()))
    image = decode(source.read("digits/0042.png"), "digits/0042.png")
    expected = load_digits().images[42] * 255 / 16
    assert image.mode == "L"
    assert np.abs(np.asarray(image) - expected).max() <= 0.5
    assert Image.open(io.BytesIO(source.read("digits/0000.png"))).size == (8, 8)


@pytest.mark.parametrize("uri", ["digits/1797.png", "digits/-001.png", "digits/9999.png"])
def test_unknown_scan_is_rejected(uri: str) -> None:
    with pytest.raises(Rejected, match="missing"):
        Digits(DigitsSpec()).bytes().read(uri)
