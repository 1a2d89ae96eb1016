from __future__ import annotations

from engine.report.sections.images import FIRST_CLASSES, FIRST_TILES, first_screen
from engine.report.tiles import ClassTiles, MadeTiles


def test_the_top_of_the_page_has_classes_with_both_kinds_of_images() -> None:
    def of_class(label: str, kept: int, synthetic: bool = True) -> ClassTiles:
        return ClassTiles(label, ["r"] * 8, [MadeTiles("g", synthetic, ["k"] * kept, [])])

    classes = [of_class("none", 0), of_class("moved", 8, synthetic=False)]
    classes += [of_class(str(number), 8) for number in range(9)]
    chosen = first_screen(classes)
    assert [row.label for row in chosen] == ["0", "1", "2"][:FIRST_CLASSES]
    assert {len(row.real) for row in chosen} == {FIRST_TILES}
    assert [maker.kept for maker in chosen[0].makers] == [["k"] * FIRST_TILES]
