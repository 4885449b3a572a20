"""Build the site: ``python -m tools.site.build [--output DIR]``. Every warning is an error.

The pages keep their places, so that their links hold: README.md, docs/ and so on become the source
directory ``DIR.pages``, together with generated pages and the navigation of ``nav.toml``. Then
Sphinx runs, and ``check`` looks at each link of the made pages, and for anything that they would
load from the network.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tools.site.commands import commands
from tools.site.pages import command_page, commands_page, python_page

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
#: Pages outside of docs/.
OTHERS = ("README", "ARCHITECTURE", "CONTRIBUTING", "SECURITY", "CHANGELOG", "guest/README")


def toctrees() -> str:
    """The navigation, as hidden directives for the first page."""
    parts = tomllib.loads((HERE / "nav.toml").read_text())["part"]
    blocks = []
    for part in parts:
        names = [
            f"{title} <{os.path.normpath(f'docs/{name}')}>" for name, title in part["pages"].items()
        ]
        blocks.append(
            "\n".join(
                [
                    "```{toctree}",
                    ":hidden:",
                    ":titlesonly:",
                    f":caption: {part['title']}",
                    "",
                    *names,
                    "```",
                ]
            )
        )
    return "\n\n".join(blocks) + "\n"


def linked(text: str, page: Path) -> str:
    """The text of a page, with links that only a view of the repository can follow made to fit:
    a directory stands for its README, pages that are HTML already are linked as they are, and
    source files are only named.
    """

    def link(match: re.Match[str]) -> str:
        label, target = match[1], match[2]
        if target.startswith(("https://", "#")):
            return match[0]
        path = page.parent / target.partition("#")[0]
        if target.endswith(".html"):
            return f'<a href="{target}">{label}</a>'
        if path.is_dir():
            readme = (path / "README.md").is_file()
            return f"[{label}]({target.rstrip('/')}/README.md)" if readme else label
        within = path.resolve().is_relative_to(ROOT / "docs")
        return match[0] if within or path.suffix == ".md" or path.name == "LICENSE" else label

    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", link, text)


def assemble(source: Path) -> None:
    """Put all pages into the directory ``source``; what has not changed keeps its time."""
    made: dict[Path, str] = {}
    pages = [*(ROOT / f"{name}.md" for name in OTHERS), *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        made[page.relative_to(ROOT)] = linked(page.read_text(), page)
    made[Path("index.md")] = f"{(HERE / 'index.md').read_text()}\n{toctrees()}"
    reference = Path("docs/reference")
    found = commands()
    made[reference / "commands.md"] = commands_page(found)
    for command in found:
        word = command.name.removeprefix("pyvmm ")
        made[reference / "commands" / f"{word}.md"] = command_page(command)
    made[reference / "python.rst"] = python_page()
    copies = {Path("LICENSE"): ROOT / "LICENSE"}
    for path in (ROOT / "docs").rglob("*"):
        name = path.relative_to(ROOT)
        if path.is_file() and path.suffix != ".md":
            extra = path.suffix == ".html"
            copies[Path("_files/extra") / name if extra else name] = path
    for path in (HERE / "static").iterdir():
        copies[Path("_files/static") / path.name] = path
    for old in sorted(source.rglob("*"), reverse=True):
        if old.is_file() and old.relative_to(source) not in {*made, *copies}:
            old.unlink()
    for name, text in made.items():
        target = source / name
        if not target.is_file() or target.read_text() != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
    for name, origin in copies.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(origin, source / name)


class _Page(HTMLParser):
    """The links of a page, its anchors, and what a browser would load for it."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called for each tag."""
        has = {name: value or "" for name, value in attrs}
        self.anchors |= {has[name] for name in ("id", "name") if name in has}
        if tag == "a" and "href" in has:
            self.links.append(has["href"])
        if tag == "link" and has.get("rel") in ("stylesheet", "icon", "preload"):
            self.loads.append(has["href"])
        if "src" in has:
            self.loads.append(has["src"])


def check(site: Path) -> list[str]:
    """What is wrong with the links of a built site: a target that is not there, or a file that a
    browser would fetch from the network.
    """
    pages: dict[Path, _Page] = {}
    for path in sorted(site.rglob("*.html")):
        pages[path.resolve()] = _Page()
        pages[path.resolve()].feed(path.read_text())
    wrong = []
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        for target in page.loads:
            if urlsplit(target).netloc:
                wrong.append(f"{name}: loads {target}")
        for target in [*page.links, *page.loads]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or not target:
                continue
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not to.exists():
                wrong.append(f"{name}: {target}: no such file")
            elif anchor and to in pages and anchor not in pages[to].anchors:
                wrong.append(f"{name}: {target}: no such anchor")
    styles = [
        p for p in site.rglob("*.css") if re.search(r"(url\(|@import)\W*https?:", p.read_text())
    ]
    return wrong + [f"{path.relative_to(site)}: loads from the network" for path in styles]


def build(output: Path) -> int:
    """Build the site into ``output``; returns the exit status."""
    from sphinx.cmd.build import build_main

    source = Path(f"{output}.pages")
    assemble(source)
    words = ["-q", "-W", "--keep-going", "-j", "auto", "-c", str(HERE)]
    for kind in ("static", "extra"):
        words += ["-D", f"html_{kind}_path={source / '_files' / kind}"]
    status = build_main([*words, "-d", f"{output}.doctrees", str(source), str(output)])
    if status:
        return status
    wrong = check(output)
    print("\n".join(wrong), end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tools.site.build", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build/site", metavar="DIR")
    args = parser.parse_args()
    status = build(args.output.resolve())
    if not status:
        print(f"the site is in {args.output}: open {args.output}/index.html")
    return status


if __name__ == "__main__":
    sys.exit(main())
