"""Links between the Markdown files of the repository: whether they hold there, and what they are on the site.

On the site, a file outside docs/ that a page links to has a page of its own, and so have those that it links to.

    python docs/site/links.py     # names broken links; exit status 1 if there are any
"""

import functools
import os
import posixpath
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = "files"
"""Folder of the site for pages of files outside docs/."""
LANGUAGES = {".yaml": "yaml", ".yml": "yaml", ".py": "python", ".sh": "bash", ".json": "json", ".cfg": "ini"}
_LINK = re.compile(r"(?<=\]\()[^)\s]+(?=\))")
_FENCE = re.compile(r"\s*(```+|~~~+)")
_OPTION = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//")


def prose(text: str) -> Iterator[tuple[int, str, bool]]:
    """Lines by number, and whether they are prose: not in a block of code."""
    fence = ""
    for number, line in enumerate(text.split("\n"), start=1):
        found = _FENCE.match(line)
        if found and (not fence or found[1].startswith(fence)):
            fence = "" if fence else found[1]
            yield number, line, False
        else:
            yield number, line, not fence


def links_of(text: str) -> Iterator[tuple[int, str]]:
    """Links to files, with the number of their line."""
    for number, line, is_prose in prose(text):
        if is_prose:
            yield from ((number, link) for link in _LINK.findall(line) if not _ELSEWHERE.match(link))


def anchors_of(text: str) -> set[str]:
    """Names that links into a page may end with."""
    found: dict[str, int] = {}
    for _, line, is_prose in prose(text):
        heading = re.match(r"#{1,6}\s+(.*?)\s*$", line)
        if heading and is_prose:
            name = slug(heading[1])
            found[name] = found.get(name, -1) + 1
            if found[name]:
                found[f"{name}_{found[name]}"] = 0
    return {*found, *re.findall(r'\bid="([^"]+)"', text)}


def slug(heading: str) -> str:
    """The name of a heading in links."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def documents(root: Path) -> list[Path]:
    """The Markdown files that git knows, or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\n")
    return sorted(root / name for name in names if name and (root / name).is_file())


def broken(root: Path) -> Iterator[str]:
    """Links of Markdown files to files that are not there, or to places in them that are not."""
    for document in documents(root):
        text = document.read_text(encoding="utf-8")
        for number, link in links_of(text):
            path, _, anchor = link.partition("#")
            target = Path(os.path.normpath(document.parent / path)) if path else document
            where = f"{document.relative_to(root)}:{number}: {link}"
            if not target.exists():
                yield f"{where}: no such file"
            elif anchor and (target.suffix != ".md" or anchor not in anchors_of(target.read_text(encoding="utf-8"))):
                yield f"{where}: no such heading"


# ---- on the site


def page_of(path: str) -> str:
    """The page of a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"{FILES}/{path}/" + ("README.md" if (ROOT / path / "README.md").is_file() else "index.md")
    return f"{FILES}/{path}" if path.endswith(".md") else f"{FILES}/{path}.md"


def file_of(page: str) -> str:
    """The file of the repository that a page shows: what its links are relative to."""
    return page.removeprefix(f"{FILES}/") if page.startswith(f"{FILES}/") else f"docs/{page}"


def for_site(text: str, page: str) -> str:
    """The text of a page with its links as they are on the site."""

    def replaced(match: re.Match[str]) -> str:
        path, mark, anchor = match[0].partition("#")
        if _ELSEWHERE.match(match[0]) or not path:
            return match[0]
        target = page_of(posixpath.normpath(posixpath.join(posixpath.dirname(file_of(page)), path)))
        return posixpath.relpath(target, posixpath.dirname(page) or ".") + mark + anchor

    return "\n".join(_LINK.sub(replaced, line) if is_prose else line for _, line, is_prose in prose(text))


def with_whole_options(html: str) -> str:
    """``html`` in which options in the code of a sentence are marked: a browser would break them at their hyphens."""
    marked = r'<span class="option">\g<0></span>'
    code = re.compile(r"<pre\b.*?</pre>|(?<=<code>)[^<]*(?=</code>)", flags=re.DOTALL)
    return code.sub(lambda found: found[0] if found[0].startswith("<pre") else _OPTION.sub(marked, found[0]), html)


def titles() -> dict[str, str]:
    """The pages of files outside docs/, with their names in the navigation."""
    return {page: _title(file_of(page)) for page in sorted(pages())}


def _title(name: str) -> str:
    name = re.sub(r"/(README|index)\.md$", "", name)
    return name if (ROOT / name).exists() else name.removesuffix(".md")


@functools.cache
def pages() -> dict[str, str]:
    """Pages of the files outside docs/ that pages link to, by path."""
    found: dict[str, str] = {}
    waiting = [*documents(ROOT / "docs"), ROOT / "CHANGELOG.md"]
    while waiting:
        path = waiting.pop()
        name = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8") if path.suffix == ".md" else ""
        if not name.startswith("docs/"):
            found[page_of(name)] = text or _shown(path, name)
        for _, link in links_of(text):
            target = Path(os.path.normpath(path.parent / link.partition("#")[0]))
            if link.startswith("#") or ROOT / "docs" in target.parents:
                continue
            readme = target / "README.md"
            target = readme if readme.is_file() else target
            if page_of(target.relative_to(ROOT).as_posix()) not in found and target.exists():
                waiting.append(target)
    return found


def _shown(path: Path, name: str) -> str:
    """A page with a file, or with all files of a folder."""
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.is_file() and not each.name.startswith("."))
        parts = [f"## {each.name}\n\n{_block(each)}" for each in files if each.name != "__init__.py"]
        return "\n".join([f"# {name}\n", *parts])
    return f"# {name}\n\n{_block(path)}"


def _block(path: Path) -> str:
    return f"````{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text(encoding='utf-8').rstrip()}\n````\n"


def main(say: Callable[[str], None] = print) -> int:
    found = [*broken(ROOT)]
    for line in found:
        say(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
