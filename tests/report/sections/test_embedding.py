from __future__ import annotations

import numpy as np

from engine.report.sections.embedding import sheet


def test_a_sheet_of_pictures_keeps_its_order_and_its_bytes() -> None:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (96, 96, 3), dtype=np.uint8) for _ in range(50)]
    large, small = sheet(images, 10**6), sheet(images, 60_000)
    assert large.side > small.side > 0
    assert len(small.url) <= 60_000 + 30
    assert sheet(images, 100).url == ""
