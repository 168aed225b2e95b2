"""One self-contained HTML page: nothing is loaded, nothing runs, and all text is escaped as it is put in."""

import base64
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from matplotlib.ticker import MaxNLocator

from ..weights import checkpoints

__all__: list[str] = []

Element = ElementTree.Element
Content = Element | str | int | float | None

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 400, 230, 62, 24, 16  # of a chart, in units of its drawing
STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1c2024; --soft: #5b6470; --line: #d5dae0; --box: #f4f6f8;
  --c0: #0072b2; --c1: #c44e00; --c2: #00805c; --c3: #a6467a; --c4: #6a51a3; --c5: #8a6d00;
  --c6: #4d4d4d; --c7: #1a7f9c }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --text: #e4e7ea; --soft: #a3adb8; --line: #3a424a;
  --box: #1f2429; --c0: #56b4e9; --c1: #f59042; --c2: #35c79d; --c3: #e08bb8; --c4: #b3a2e8; --c5: #d8bd3f; --c6: #bbb;
  --c7: #6fcbe0 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1160px; padding: 20px 16px 60px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 26px; line-height: 1.2; margin: 8px 0 } h2 { font-size: 19px; margin: 36px 0 8px }
a { color: var(--c0) } p, li, summary { max-width: 75ch } .soft, figcaption { color: var(--soft) }
.verdict { background: var(--box); border-left: 4px solid var(--c0); padding: 10px 16px; margin: 14px 0 }
.verdict p { margin: 4px 0 } summary { cursor: pointer; padding: 6px 0; color: var(--c0) }
.grid { display: grid; gap: 20px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)) }
figure { margin: 0 } figcaption { font-size: 13px } figcaption b { color: var(--text) } img { max-width: 100% }
.wide { overflow-x: auto } .wide img { min-width: 900px; display: block }
table { border-collapse: collapse; font-size: 14px } th { text-align: left }
th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: normal }
td:last-child:not(.number) { min-width: 18ch }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
svg { display: block; width: 100%; height: auto } svg text { font-size: 12px; fill: var(--soft) }
.rule { stroke: var(--line) } .best { stroke: var(--soft); stroke-dasharray: 2 4 }
polyline { fill: none; stroke-width: 2 } .dashed { stroke-dasharray: 7 4 } circle { stroke: none }
.map { position: relative; aspect-ratio: 1; max-height: 640px; width: 100%; border: 1px solid var(--line) }
.point { position: absolute; width: 11px; height: 11px; margin: -6px 0 0 -6px; border-radius: 50%;
  background: currentColor; opacity: .8 }
.point span { display: none; position: absolute; width: 132px; padding: 6px; background: var(--page);
  color: var(--text); border: 1px solid var(--line); font-size: 12px; line-height: 1.3; text-decoration: none }
.point:hover, .point:focus { z-index: 1; opacity: 1; outline: 2px solid var(--text) }
.point:hover span, .point:focus span { display: block } .point img { display: block; margin: 0 auto 4px }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 50%; background: currentColor }
.key { margin-right: 16px } .swatch { margin-right: 5px }
""" + "".join(
    f".c{n} {{ color: var(--c{n}) }} polyline.c{n} {{ stroke: var(--c{n}) }} circle.c{n} {{ fill: var(--c{n}) }}\n"
    for n in range(8)
)


def element(tag: str, *content: Content, **attributes: object) -> Element:
    """Make an element; text within it is escaped when the page is written. ``class_`` is the attribute ``class``."""
    made = Element(tag, {name.rstrip("_"): str(value) for name, value in attributes.items()})
    for part in content:
        if isinstance(part, Element):
            made.append(part)
        elif part is not None and len(made):
            made[-1].tail = (made[-1].tail or "") + str(part)
        elif part is not None:
            made.text = (made.text or "") + str(part)
    return made


def section(title: str, *content: Content) -> Element:
    """Put a heading, which can be linked to by its first word, over some content."""
    return element("section", element("h2", title, id=title.split()[0].lower()), *content)


def details(summary: str, *content: Content) -> Element:
    """Fold some content away."""
    return element("details", element("summary", summary), *content)


def table(head: Sequence[str], rows: Iterable[Sequence[Content]]) -> Element:
    """Make a table, which scrolls by itself where the window is narrow; columns of numbers stand right."""
    rows = [list(row) for row in rows]
    kinds = [{"class_": "number"} if rows and all(isinstance(row[place], int | float | None) for row in rows) else {}
             for place in range(len(head))]  # fmt: skip

    def line(tag: str, row: Sequence[Content]) -> Element:
        return element("tr", *(element(tag, shown(cell), **kind) for cell, kind in zip(row, kinds, strict=True)))

    body = element("tbody", *(line("td", row) for row in rows))
    return element("div", element("table", element("thead", line("th", head)), body), class_="wide")


def shown(value: Content) -> Content:
    """Show a number in four digits."""
    return f"{value:.4g}" if isinstance(value, float) else value


def picture(content: bytes, kind: str, description: str) -> Element:
    """Put a picture into the page; ``kind`` is png or jpeg."""
    return element("img", src=f"data:image/{kind};base64,{base64.b64encode(content).decode()}", alt=description)


def chart(title: str, about: str, series: Mapping[str, Sequence[tuple[float, float]]], best: int = -1) -> Element:
    """Draw lines over epochs.

    Args:
        title: of the chart.
        about: what it shows, in words.
        series: by name, points of epoch and value; those that are not finite are left out.
        best: the epoch to mark.
    """
    series = {name: [point for point in points if math.isfinite(point[1])] for name, points in series.items()}
    points = [point for line in series.values() for point in line]
    if not points:
        return element("figure", element("figcaption", element("b", title), " has no finite value."))
    xs, x_place = _axis([x for x, _ in points], LEFT, WIDTH - MARGIN, whole=True)
    ys, y_place = _axis([y for _, y in points], HEIGHT - BOTTOM, MARGIN)
    drawing = element("svg", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", **{"aria-label": title})
    for y in ys:
        drawing.append(_line(LEFT, y_place(y), WIDTH - MARGIN, y_place(y), "rule"))
        drawing.append(element("text", f"{y:.6g}", x=LEFT - 6, y=f"{y_place(y) + 4:.1f}", **{"text-anchor": "end"}))
    for x in xs:
        drawing.append(element("text", f"{x:g}", x=f"{x_place(x):.1f}", y=HEIGHT - 6, **{"text-anchor": "middle"}))
    if any(x == best for x, _ in points):
        drawing.append(_line(x_place(best), MARGIN, x_place(best), HEIGHT - BOTTOM, "best"))
    for place, (name, line) in enumerate(series.items()):
        corners = [f"{x_place(x):.1f},{y_place(y):.1f}" for x, y in line]
        style = f"c{place % 8}" + (" dashed" if place % 2 else "")
        drawing.append(element("polyline", points=" ".join(corners), class_=style))
        if len(line) <= 60:
            drawing.extend(_dot(x_place(x), y_place(y), place, f"{name} epoch {x}: {y:.4g}") for x, y in line)
    keys = legend(series) if len(series) > 1 else []
    return element("figure", element("figcaption", element("b", title), " ", about), drawing, *keys)


def legend(names: Iterable[str]) -> list[Element]:
    """Name the colours, in the order of the names."""
    keys = (
        element("span", element("span", class_=f"swatch c{place % 8}"), name, class_="key")
        for place, name in enumerate(names)
    )
    return [element("figcaption", *keys)]


def _axis(
    values: Sequence[float], start: float, end: float, whole: bool = False
) -> tuple[list[float], Callable[[float], float]]:
    """Choose ticks for values, and say where on the drawing, from start to end, a value stands."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
    ticks = [float(tick) for tick in MaxNLocator(5, integer=whole).tick_values(low, high)]
    if whole:
        ticks = [tick for tick in ticks if low <= tick <= high]
    else:
        low, high = ticks[0], ticks[-1]
    return ticks, lambda value: start + (value - low) * (end - start) / (high - low)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Element:
    ends = zip(("x1", "y1", "x2", "y2"), (x1, y1, x2, y2), strict=True)
    return element("line", class_=kind, **{name: f"{value:.1f}" for name, value in ends})


def _dot(x: float, y: float, colour: int, text: str) -> Element:
    return element("circle", element("title", text), cx=f"{x:.1f}", cy=f"{y:.1f}", r=3, class_=f"c{colour % 8}")


def write(path: Path, title: str, *content: Element) -> None:
    """Write the page, whole or not at all; what is there is replaced.

    Args:
        path: of the file.
        title: of the window; the page's own heading is part of the content.
        content: what stands in it.
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", **{"http-equiv": "Content-Security-Policy", "content": POLICY}),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", STYLE),
    )
    page = element("html", head, element("body", element("main", *content)), lang="en")
    text = "<!DOCTYPE html>\n" + ElementTree.tostring(page, encoding="unicode", method="html")
    checkpoints.save_text(text, path)
