"""A page, taken apart by the standard library's parser."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br", "link", "img", "hr", "input"}


@dataclass
class Page(HTMLParser):
    """What a page holds; raises AssertionError where tags do not match.

    Attributes:
        tags: all of them, with their attributes.
        words: text outside style sheets, by the id of the section that it stands in.
        tables: rows of cells, by that id.
        marks: (class, id of the figure's title) of every element of class mark or error.
    """

    text: str
    tags: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    words: dict[str, str] = field(default_factory=dict)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    marks: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._open: list[str] = []
        self._section = self._figure = ""
        self.feed(self.text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        if tag == "section":
            self._section = found["id"]
        if tag == "svg":
            self._figure = found.get("aria-labelledby", "").partition("-title")[0]
        if {"mark", "error"} & set(found.get("class", "").split()):
            self.marks.append((found["class"].split()[0], self._figure))
        if tag == "tr":
            self.tables.setdefault(self._section, []).append([])
        if tag in ("td", "th"):
            self.tables[self._section][-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.words[self._section] = self.words.get(self._section, "") + data
        if {"td", "th"} & set(self._open):
            self.tables[self._section][-1][-1] += data

    def count(self, kind: str, figure: str) -> int:
        """How many elements of a class ("mark", "error") a figure has."""
        return self.marks.count((kind, figure))

    def row(self, section: str, name: str) -> list[str]:
        """The first row of a section's tables that starts with a name."""
        return next(row for row in self.tables[section] if row and row[0] == name)


def value(cell: str) -> float:
    """What a cell says: "-1.5", "2.6 times ten to the -5", with typographic signs."""
    powers = dict(
        zip(
            "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079",
            "-0123456789",
            strict=True,
        )
    )
    plain = cell.replace("\N{MINUS SIGN}", "-").replace("\N{PLUS-MINUS SIGN} ", "")
    mantissa, _, power = plain.partition("\N{MULTIPLICATION SIGN}10")
    return float(mantissa) * 10.0 ** int("".join(powers[sign] for sign in power) or 0)


def integer(cell: str) -> int:
    """ "12,345" -> 12345."""
    return int(cell.replace(",", ""))
