from __future__ import annotations

import csv
import io

from engine.report.tries import as_csv


def test_tries_keep_their_digits_and_no_text_is_a_formula() -> None:
    tries = [
        {"try": 0, "rate": 0.1234567890123, "sizes": [8, 16], "fast": True, "error": "=1+1"},
        {"try": 1, "rate": -2, "sizes": None, "fast": False, "error": ""},
    ]
    first, second = csv.DictReader(io.StringIO(as_csv(tries).decode()))
    assert first == {
        "try": "0", "rate": "0.1234567890123", "sizes": "[8, 16]", "fast": "true", "error": "'=1+1"
    }  # fmt: skip
    assert second == {"try": "1", "rate": "-2", "sizes": "", "fast": "false", "error": ""}
