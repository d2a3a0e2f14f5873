"""A page as its elements and words, and text that would like to be markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser

EVIL = "</script><script>hacked=1</script><img src=x onerror=hacked=1>&\"'\u202e\x1b[31m"


class Elements(HTMLParser):
    """The elements of a page, its text, and the JSON in it."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.inside = ""
        self.feed(text)
        (self.figures,) = re.findall(r'id="figures">(.*?)</script>', text) or [None]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)
