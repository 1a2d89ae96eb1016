"""scikit-learn's digits: 1,797 real scans of handwritten digits at 8 x 8, 16 grey levels (UCI, E.
Alpaydin).

scikit-learn contains them, so a study can run without other data. The study's `preprocess` enlarges
them. Writers are not recorded: use `split.group: none`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

import numpy as np
import pyarrow as pa

from engine.core import rows
from engine.core.rows import TaskKind
from engine.data.images import Rejected
from engine.readers import Reader, ReaderSpec


class DigitsSpec(ReaderSpec):
    name: Literal["digits"] = "digits"


@lru_cache(maxsize=1)
def _scans() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 16 grey levels (0 to 16) to the full range of a byte.
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target


class DigitsBytes:
    def read(self, uri: str) -> bytes:
        from PIL import Image

        images, _ = _scans()
        index = int(uri.removeprefix("digits/").removesuffix(".png"))
        if not 0 <= index < len(images):
            raise Rejected("missing", uri)
        target = io.BytesIO()
        Image.fromarray(images[index]).save(target, "PNG")
        return target.getvalue()


class Digits(Reader[DigitsSpec]):
    version = 1

    def tasks(self) -> Mapping[str, TaskKind]:
        return {"class": "single"}

    def records(self) -> pa.Table:
        _, targets = _scans()
        count = len(targets)
        return pa.table(
            [
                [f"digits-{index:04d}" for index in range(count)],
                [f"digits/{index:04d}.png" for index in range(count)],
                [str(target) for target in targets],
                pa.nulls(count, pa.string()),
                pa.nulls(count, pa.string()),
            ],
            schema=rows.records_schema(self.tasks()),
        )

    def bytes(self) -> DigitsBytes:
        return DigitsBytes()

    def fingerprint(self) -> Mapping[str, str]:
        return {"digits": "sklearn"}
