from __future__ import annotations

from engine.report.download import as_csv
from engine.report.study_page import links_to


def test_a_large_table_stands_beside_the_page() -> None:
    small, large = as_csv([{"a": 1}]), as_csv([{"a": "x" * 200_000}])
    (_, inside), *others = links_to({"small.csv": small, "large.csv": large})
    assert inside.startswith("data:text/csv")
    assert others == [("large.csv", "tables/large.csv"),
                      ("predictions.parquet", "tables/predictions.parquet")]  # fmt: skip
