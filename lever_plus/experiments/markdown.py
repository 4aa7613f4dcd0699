"""The one way to Markdown and to a page: what names and files bring into a text is shown; it marks nothing up."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from open_mmicl.errors import plain

TEMPLATES = Path(__file__).parent / "templates"
_TAG = re.compile(r"<(?=[A-Za-z/!?])")


def tame(value: Any) -> str:
    """A value as a template or a table shows it: one line, no HTML, no link, no end of a cell.

    Our own texts hold none of these, so that they stay as they are.
    """
    text = _TAG.sub("&lt;", plain(value, sys.maxsize))
    return text.replace("](", "]\\(").replace("|", "\\|")


def row(cells: Iterable[Any]) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(tame, cells))} |"


def render(template: str, **values: Any) -> str:
    """A Markdown file of templates/, every value of it through :func:`tame`."""
    environment = jinja2.Environment(  # noqa: S701 - Markdown, not HTML
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False, finalize=tame,
    )  # fmt: skip
    return environment.get_template(template).render(**values)


def page(template: str, lang: str, **values: Any) -> str:
    """An HTML file of templates/, self-contained: ``style`` is report.css, ``html_lang`` the language's code."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    style = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(
        style=style, lang=lang, html_lang={"zh": "zh-CN", "en": "en"}[lang], **values
    )
