"""A self-contained HTML page from Python values. Text is escaped unless it is :class:`Markup` already."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence

CSS = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --panel: #ffffff; --ink: #1c2126; --soft: #5c6670; --line: #e2e5e8; --accent: #2b7fd9;
  --wash: rgba(43, 127, 217, .13); --warn: #b3541e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --panel: #1b1f23; --ink: #e7eaed; --soft: #9aa4ae; --line: #2d3338; --accent: #5ea5ef;
    --wash: rgba(94, 165, 239, .2); --warn: #e79a62;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); line-height: 1.55; font-size: 15.5px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main, header, footer { max-width: 1160px; margin: 0 auto; padding: 0 28px; }
header { padding-top: 44px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.015em; }
h2 {
  font-size: 21px; margin: 42px 0 8px; padding-top: 18px; border-top: 1px solid var(--line); letter-spacing: -.01em;
}
h3 { font-size: 16px; margin: 30px 0 8px; }
p { margin: 8px 0; max-width: 88ch; }
.soft, figcaption, .note { color: var(--soft); }
.note { font-style: italic; }
nav { margin: 18px 0 0; font-size: 14px; }
nav a { display: inline-block; margin-right: 16px; white-space: nowrap; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(205px, 1fr)); gap: 14px; margin: 22px 0; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px 12px; }
.card b {
  display: block; font-size: 31px; font-weight: 650; line-height: 1.2; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums;
}
.card .name { font-size: 13.5px; color: var(--soft); }
.card .more { font-size: 13px; color: var(--soft); font-variant-numeric: tabular-nums; }
.card.main { border-color: var(--accent); }
.card.main b { color: var(--accent); }
.scroll { overflow-x: auto; margin: 14px 0; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th {
  font-weight: 600; font-size: 13px; color: var(--soft); border-bottom: 2px solid var(--line); vertical-align: bottom;
}
th:first-child, td:first-child { padding-left: 0; }
td.number, th.number { text-align: right; }
td.number, td:first-child { white-space: nowrap; }
td small { color: var(--soft); font-size: 12px; margin-left: 6px; }
tr.group td { font-weight: 600; background: var(--wash); padding-left: 8px; }
tr.indent td:first-child { padding-left: 20px; }
figure { margin: 16px 0; }
figure svg { width: 100%; height: auto; display: block; }
figure img { width: 100%; height: auto; display: block; border-radius: 6px; background: #000; }
figcaption { font-size: 13.5px; margin-top: 7px; line-height: 1.45; }
figcaption strong { color: var(--ink); font-weight: 600; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(440px, 1fr)); gap: 0 22px; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 0 18px; }
.scans { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 18px 20px; margin: 14px 0; }
.scan {
  margin: 0; padding: 8px; background: var(--panel); border: 1px solid var(--line); border-radius: 8px; min-width: 0;
}
.scan.noted { border-left: 4px solid #d9a22b; } .scan.refused { border-left: 4px solid var(--warn); }
.scan figcaption { font-size: 12.5px; line-height: 1.4; overflow-wrap: anywhere; }
.scan ul { margin: 3px 0 0; padding-left: 16px; color: var(--warn); }
.planes { display: flex; gap: 4px; align-items: center; }
.plane { position: relative; background: #000; overflow: hidden; min-width: 0; }
.plane img, .plane i { position: absolute; inset: 0; width: 100%; height: 100%; border-radius: 0; }
.plane i {
  background-position: center; background-image:
    linear-gradient(to right, transparent calc(50% - .5px), rgba(255, 214, 90, .22) 0 calc(50% + .5px), transparent 0),
    linear-gradient(to bottom, transparent calc(50% - .5px), rgba(255, 214, 90, .22) 0 calc(50% + .5px), transparent 0);
}
.plane b { position: absolute; font: 600 10px/1 system-ui, sans-serif; color: #ffd65a; text-shadow: 0 0 2px #000; }
.plane .top { top: 2px; left: 50%; translate: -50%; } .plane .bottom { bottom: 2px; left: 50%; translate: -50%; }
.plane .left { left: 2px; top: 50%; translate: 0 -50%; } .plane .right { right: 2px; top: 50%; translate: 0 -50%; }
.pages a, .pages strong { white-space: nowrap; }
.swatch { display: inline-block; width: .8em; height: .8em; border: 2px solid; margin: 0 .3em -.05em .1em; }
.right { color: #2e8b57; } .wrong { color: var(--warn); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 22px; font-size: 14px; margin: 14px 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
details { margin: 14px 0; } summary { cursor: pointer; color: var(--accent); font-size: 14.5px; }
footer { margin-top: 60px; padding-top: 16px; padding-bottom: 40px; font-size: 13px; color: var(--soft); }
@media (max-width: 560px) {
  .gallery { grid-template-columns: 1fr; }
  main, header, footer { padding: 0 16px; }
}
@media print {
  body { background: #fff; font-size: 11pt; } nav { display: none; } main, header, footer { max-width: none; }
  h2 { break-after: avoid; } figure, tr, .card { break-inside: avoid; }
}
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Content security policy: a browser that shows the page may ask nothing of anybody."""


class Markup(str):
    """Text that is HTML already and is not escaped again."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str) -> Markup:
    """An HTML element; children and attribute values are escaped. ``class_`` stands for ``class``."""
    shown = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items() if value)
    return Markup(f"<{name}{shown}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    """Children one after the other, escaped unless they are markup."""
    return Markup("".join(child if isinstance(child, Markup) else html.escape(child) for child in children))


def table(headings: Sequence[str], rows: Sequence[Markup]) -> Markup:
    """A table of :func:`row`; every heading but the first stands over numbers unless it ends in a space."""
    cells = [
        tag("th", text.rstrip(), class_="number" if index and not text.endswith(" ") else "", scope="col")
        for index, text in enumerate(headings)
    ]
    head = tag("thead", tag("tr", *cells))
    return tag("div", tag("table", head, tag("tbody", *rows)), class_="scroll")


def row(*cells: str, class_: str = "", num_text: int = 1) -> Markup:
    """A table row whose first ``num_text`` cells are text and whose others are numbers."""
    kinds = ["" if index < num_text else "number" for index in range(len(cells))]
    return tag("tr", *(tag("td", cell, class_=kind) for cell, kind in zip(cells, kinds, strict=True)), class_=class_)


def group_row(text: str, num_columns: int) -> Markup:
    """A row that heads the ones below it."""
    return tag("tr", tag("td", text, colspan=str(num_columns)), class_="group")


def definitions(pairs: Sequence[tuple[str, str]]) -> Markup:
    """Names and what they stand for, in two columns."""
    return tag("dl", *(join(tag("dt", name), tag("dd", value)) for name, value in pairs))


def picture(png: bytes, alternative: str, *caption: str) -> Markup:
    """A PNG inside the page, with a caption."""
    data = base64.b64encode(png).decode()
    image = Markup(f'<img src="data:image/png;base64,{data}" alt="{html.escape(alternative)}">')
    return tag("figure", image, tag("figcaption", *caption))


def drawing(svg: bytes, alternative: str, *caption: str) -> Markup:
    """An SVG chart inside the page, so that its ink and font follow the page, with a caption."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    label = f'<svg role="img" aria-label="{html.escape(alternative)}"'
    return tag("figure", Markup(text.replace("<svg", label, 1)), tag("figcaption", *caption))


def page(title: str, header: Markup, sections: Sequence[tuple[str, Markup]], footer: Markup) -> str:
    """The whole document.

    Args:
        title: of the window.
        header: what stands above the list of sections.
        sections: heading and body of each.
        footer: last lines.
    """
    names = [re.sub(r"[^a-z]+", "-", heading.lower()).strip("-") for heading, _ in sections]
    links = [tag("a", heading, href=f"#{name}") for name, (heading, _) in zip(names, sections, strict=True)]
    bodies = [
        tag("section", tag("h2", heading), body, id=name) for name, (heading, body) in zip(names, sections, strict=True)
    ]
    head = join(
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        tag("title", title),
        Markup(f"<style>{CSS}</style>"),
    )
    body = join(tag("header", header, tag("nav", *links)), tag("main", *bodies), tag("footer", footer))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'
