"""HTML and SVG as text in which everything that came from outside is escaped."""

import html
import re
from collections.abc import Iterable, Sequence

CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # which HTML forbids
VOID = frozenset({"br", "img", "input"})


class Markup(str):
    """Text that is HTML already; every other text is escaped where it is put in."""

    __slots__ = ()


def escape(text: str) -> str:
    """`text` as it can stand in a page, between tags or in an attribute."""
    return html.escape(CONTROLS.sub("\ufffd", text))


def join(*parts: str | None) -> Markup:
    """The parts one after another, plain text escaped, None left out."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in parts if part is not None))


def element(tag: str, *children: str | None, **attributes: object) -> Markup:
    """`<tag ...>children</tag>`. In the names of attributes "_" stands for "-", and one at the end for nothing; an
    attribute that is None is left out."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in VOID:
        return Markup(f"<{tag}{written}>")
    return Markup(f"<{tag}{written}>{join(*children)}</{tag}>")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], **attributes: object) -> Markup:
    """A table whose cells repeat their column's name in `data-label`, for screens that show a row as a card."""
    cells = (
        [element("th", row[0], scope="row")]
        + [element("td", cell, data_label=name) for name, cell in zip(head[1:], row[1:], strict=True)]
        for row in rows
    )
    return element(
        "div",
        element(
            "table",
            element("thead", element("tr", *(element("th", name, scope="col") for name in head))),
            element("tbody", *(element("tr", *row) for row in cells)),
            **attributes,
        ),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label="table",
    )
