"""Pages in the form that tests compare."""

from __future__ import annotations

import html
import re


def plain_headings(page: str) -> str:
    """The page without the ids of its headings, which serve only links."""
    return re.sub(r'<h2 id="section-\d+">', "<h2>", page)


def plain_text(page: str) -> str:
    """The words of a page, without tags, separated by single spaces."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())
