"""Rows in color as one HTML file that needs no network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from html import escape
from pathlib import Path

from finequant.recipes.errors import UserError

Run = tuple[str, bool]
"""A piece of text, and whether its tokens are targets."""

STYLE = (
    "body{font-family:sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "pre{white-space:pre-wrap;background:#f6f6f6;padding:1em;color:#666}"
    "b{color:#07651f;background:#dff5e1}h2{font-size:1em}"
)


def check_page(page: Path) -> None:
    """Refuses to replace anything but an empty file, or a page as `html_page` returned it.

    Raises:
        UserError: for a folder, or a file that somebody else wrote or edited.
    """
    if page.is_dir():
        raise UserError(f"--html {page}: this is a folder: name a file in it")
    if not page.is_file():
        return
    content, mark, digest = page.read_bytes().rpartition(MARK)
    if (mark or digest) and digest != _digest(content):
        raise UserError(
            f"--html {page}: exists already, and was edited, or is no page of `finequant data`: "
            "choose another name"
        )


MARK = b"<!-- finequant data, sha256 "
"""Begins the last line of a page, which tells whether the page was edited."""


def _digest(content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()} -->\n".encode()


def html_page(name: str, lines: Iterable[str], rows: Iterable[tuple[str, list[Run]]]) -> bytes:
    """Returns the page.

    lines: statements about all rows.
    rows: the location of each row, and its runs of target tokens and other tokens.
    """
    title = f"{escape(name)}: rows as the model sees them"
    parts = [
        f"<h2>{escape(where)}</h2>\n<pre>{''.join(map(_marked, runs))}</pre>"
        for where, runs in rows
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{STYLE}</style>\n<h1>{title}</h1>\n<p>Target tokens are green; the loss mask "
        f"leaves out the others.</p>\n<ul>{''.join(f'<li>{escape(line)}' for line in lines)}</ul>\n"
        + "\n".join(parts)
        + "\n</html>\n"
    ).encode()
    return page + MARK + _digest(page)


def _marked(run: Run) -> str:
    text, is_target = run
    return f"<b>{escape(text)}</b>" if is_target else escape(text)
