"""What mkdocs asks while it builds the site: pages made from the code, and links that hold there."""

import re
from pathlib import Path

import api
import commands
import links
import messages
import rows
import settings
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = "Reference"
ELSEWHERE = re.compile(
    r"""<(?:script|img|iframe)\b[^>]*\bsrc=["']?(?:https?:)?//[^"'\s>]*|"""
    r"""<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|preconnect|icon))[^>]*\bhref=["']?(?:https?:)?//[^"'\s>]*"""
)
"""What a browser would fetch from another host."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the generated pages into the navigation."""
    reference = next(entry[REFERENCE] for entry in config.nav if REFERENCE in entry)
    reference[1:1] = [
        {"Settings": [{title: path} for path, title in settings.titles().items()]},
        {"Commands": commands.PAGE},
    ]
    reference.append({"API": [{title: path} for path, title in api.titles().items()]})
    shown = [{path: page} for page, path in links.titles().items() if path != "CHANGELOG.md"]
    config.nav[-1]["Background"] += [{"Changes": links.page_of("CHANGELOG.md")}, {"Files": shown}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of code, and of the files that pages link to."""
    made = {**settings.pages(), commands.PAGE: commands.page(), **api.pages(), **rows.files(), **links.pages()}
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The text of a page, with what is generated in it, and with links to files of the repository as links to pages."""
    path = page.file.src_path
    if path == messages.PAGE:
        markdown += messages.section()
    if path == rows.PAGE:
        markdown = rows.with_downloads(markdown)
    return links.for_site(markdown, path)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The options of commands as words that no line breaks."""
    return links.with_whole_options(html)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that needs a network.

    Raises:
        PluginError: naming what a page would fetch.
    """
    found = [
        f"{path.relative_to(config.site_dir)}: {match}"
        for path in sorted(Path(config.site_dir).rglob("*.html"))
        for match in ELSEWHERE.findall(path.read_text(encoding="utf-8"))
    ]
    if found:
        raise PluginError("\n".join(["pages that fetch something from another host:", *found]))
