"""Pages of HTML without scripts or links."""

import base64
import html
from collections.abc import Sequence

from senet.support.text import printable

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1c1e21; --line: #c9ccd1; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #16181d; --ink: #e6e6e6; --line: #4a4f57; }
}
body { background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; font-size: .875rem; padding-top: .5rem; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .9rem; text-align: right; }
th[scope=row], th:first-child { text-align: left; font-weight: 500; }
.wide { overflow-x: auto; }
figure { margin: 1rem 0 2rem; }
figure img { max-width: 100%; height: auto; }
figcaption { font-size: .875rem; }
.verdict { border-left: 4px solid var(--line); padding-left: 1rem; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
.pictures figure { margin: 0; width: 9rem; }
.pictures img { width: 9rem; height: 9rem; object-fit: contain; image-rendering: pixelated; }
"""


def escape(text: object) -> str:
    """Text for HTML; bytes that are not UTF-8 written out."""
    return html.escape(printable(str(text)))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table whose first column names its rows."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(value)}</td>" for value in rest)
        + "</tr>\n"
        for first, *rest in rows
    )
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide"><table>{told}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>"
    )


def picture(data: bytes, kind: str, alt: str) -> str:
    """An image that lies within the page.

    Args:
        data: the file.
        kind: "svg+xml", "png", ….
        alt: what it shows, for those who do not see it.
    """
    content = base64.b64encode(data).decode()
    return f'<img src="data:image/{kind};base64,{content}" alt="{escape(alt)}">'


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{"".join(parts)}
</body>
</html>
"""
