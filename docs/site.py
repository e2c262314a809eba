"""Lets the site hold the pages where they lie in the repository, so that one link works on a forge and on the site."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = (
    "*.md", "LICENSE", "CITATION.cff", "docs/*.md", "docs/*.svg", "docs/*.css", "leaderboards/**/*.md",
    "leaderboards/*/*.svg", "leaderboards/*/sheets/*.png", "bench/models/files/*.md",
)  # fmt: skip
WIDE = ("leaderboards/", "docs/findings.md")  # pages with tables that need the whole width


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """The repository's pages by their paths in it, and what the theme adds."""
    here = {file for pattern in PAGES for file in ROOT.glob(pattern)}
    names = sorted(str(file.relative_to(ROOT)) for file in here)
    own = [File(name, str(ROOT), config.site_dir, config.use_directory_urls) for name in names]
    docs = Path(config.docs_dir)
    return Files([*(file for file in files if docs not in Path(file.abs_src_path or "/").parents), *own])


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Wide tables have the room of the table of contents, too."""
    if page.file.src_uri.startswith(WIDE):
        page.meta["hide"] = ["toc"]
    return markdown


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """What marks a page with wide tables for the style sheet."""
    return f'<div class="wide">{html}</div>' if page.file.src_uri.startswith(WIDE) else html
