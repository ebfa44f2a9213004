"""One HTML file out of the page's files: modules, styles, icon and data lie in it.

The page imports its modules through an import map, so that they can be ``data:`` URLs here. A
Content-Security-Policy in the file forbids every connection, and every script and style but these:
what a key or a name holds is text, whatever it says.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["GENERATOR", "STATIC", "is_report", "make_document"]

#: Where the page lies.
STATIC = Path(__file__).parents[1] / "page" / "static"

#: How a report is told from other files.
GENERATOR = "raywb report"

_MARK = f'<meta name="generator" content="{GENERATOR}">'

_STYLE = """
.report { margin: 0; padding: .5rem clamp(12px, 2vw, 24px);
  font: .8125rem/1.45 system-ui, sans-serif;
  border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent); }
.report p, .report ul { margin: 0; overflow-wrap: anywhere; }
.report ul { padding-left: 1.2rem; list-style: disc; font-weight: 600; }
"""


def make_document(
    data: Mapping[str, Any],
    *,
    title: str,
    about: str,
    notes: Sequence[str] = (),
    static: Path = STATIC,
) -> str:
    """Return the page with everything in it.

    Args:
        data: what the page shows, as :meth:`raywb.view.report.contents.Contents.as_json` gives it.
        title: the document's title, until the page has set its own.
        about: one sentence on what this is a report of, shown above the page.
        notes: what a reader must know, each in one sentence.
        static: the page's directory.
    """
    page = (static / "index.html").read_text(encoding="utf-8")
    scripts: list[str] = []
    styles: list[str] = []

    def style(text: str) -> str:
        if "</style" in text.lower():
            raise ValueError("a style sheet of the page would end in the middle")
        styles.append(_digest(text))
        return f"<style>{text}</style>"

    def script(kind: str, text: str) -> str:
        scripts.append(_digest(text))
        return f'<script type="{kind}">{text}</script>'

    def sheet(match: re.Match[str]) -> str:
        return style((static.parent / match[1]).read_text(encoding="utf-8"))

    def import_map(match: re.Match[str]) -> str:
        urls = {
            name: _data_url(static.parent / address, "text/javascript")
            for name, address in json.loads(match[1])["imports"].items()
        }
        return script("importmap", json.dumps({"imports": urls}))

    def entry(match: re.Match[str]) -> str:
        return script("module", 'import "raywb/main";')

    def icon(match: re.Match[str]) -> str:
        return f'href="{_data_url(static.parent / match[1], "image/svg+xml")}"'

    page = _replace(r'href="(static/[^"]+\.svg)"', icon, page)
    page = _replace(r'<link rel="stylesheet" href="(static/[^"]+)">', sheet, page)
    page = _replace(r'<script type="importmap">(.*?)</script>', import_map, page)
    page = _replace(r'<script type="module" src="static/main\.js"></script>', entry, page)
    page = _replace(r"<title>.*?</title>", lambda _: f"<title>{html.escape(title)}</title>", page)
    page = _replace(r'<main id="main"', lambda m: _above(about, notes) + m[0], page)
    page = _replace(r"</head>", lambda m: style(_STYLE) + m[0], page)
    page = _replace(r"</body>", lambda m: _data(data) + m[0], page)
    policy = (
        f"default-src 'none'; script-src data: {' '.join(scripts)}; style-src {' '.join(styles)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    guard = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    return _replace(r'<meta charset="utf-8">', lambda m: f"{m[0]}\n{guard}\n{_MARK}", page)


def is_report(path: Path) -> bool:
    """Say whether a file is a report of ours, which a newer one may take the place of."""
    with open(path, "rb") as file:
        return _MARK.encode() in file.read(16_384)


def _replace(pattern: str, by: Callable[[re.Match[str]], str], page: str) -> str:
    """Replace each place; that there is none would show in a page that does not work."""
    page, count = re.subn(pattern, by, page, flags=re.DOTALL)
    if not count:
        raise ValueError(f"the page has no {pattern}: a report of it would not be whole")
    return page


def _above(about: str, notes: Sequence[str]) -> str:
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    listed = f"<ul>{listed}</ul>" if notes else ""
    return f'<aside class="report" id="report"><p>{html.escape(about)}</p>{listed}</aside>\n'


def _data(data: Mapping[str, Any]) -> str:
    """The data as JSON that no parser of HTML or JavaScript finds an end or a comment in."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    # A half of a pair is in no key that W&B takes, and in no file of text either.
    text = text.encode("utf-8", "replace").decode()
    return f'<script type="application/json" id="raywb-data">{text}</script>\n'


def _data_url(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
