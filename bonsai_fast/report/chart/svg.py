"""SVG elements as text; all content is escaped."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

NAMESPACE = "http://www.w3.org/2000/svg"


def element(tag: str, *content: str, **attributes: object) -> str:
    """One element.

    Args:
        tag: its name.
        content: elements inside it, as this function returns them.
        attributes: `class_` is class, and other underscores are hyphens; numbers are rounded to a
            tenth, None leaves an attribute out.
    """
    written = "".join(
        f" {name.rstrip('_').replace('_', '-')}={quoteattr(_value(value))}"
        for name, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{written}>{''.join(content)}</{tag}>" if content else f"<{tag}{written}/>"


def text(x: float, y: float, words: str, class_: str | None = None, anchor: str = "start") -> str:
    """Text at a position; `anchor` is "start", "middle" or "end"."""
    place = {"x": x, "y": y, "text_anchor": None if anchor == "start" else anchor}
    return element("text", escape(words), **place, class_=class_)


def title(words: str) -> str:
    """The tooltip of the mark that contains it."""
    return element("title", escape(words))


def document(
    parts: list[str],
    width: float,
    height: float,
    *,
    name: str | None = None,
    label: str | None = None,
    description: str | None = None,
) -> str:
    """A complete image, `width` x `height`.

    Args:
        name: makes the ids of label and description unique on a page.
        label, description: what it is called and what it shows, for those who cannot see it.
    """
    about, labelled = [], None
    if name is not None and label is not None:
        about = [element("title", escape(label), id=f"{name}-title")]
        labelled = f"{name}-title"
        if description is not None:
            about += [element("desc", escape(description), id=f"{name}-desc")]
            labelled += f" {name}-desc"
    return element(
        "svg", *about, *parts,
        xmlns=NAMESPACE, viewBox=f"0 0 {width:g} {height:g}", width=f"{width:g}",
        height=f"{height:g}", class_="chart", role="img", aria_labelledby=labelled,
    )  # fmt: skip


def _value(value: object) -> str:
    # a tenth of a pixel is enough, and -0.0 is 0
    return f"{round(value, 1) + 0.0:g}" if isinstance(value, float) else str(value)
