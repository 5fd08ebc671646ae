"""Checks what Sphinx built: `python docs/check.py build/docs`.

Each link to a page, a place in a page, a picture or a style leads somewhere; nothing is loaded from
the network; each formula is there as MathML.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {("link", "href"), ("script", "src"), ("img", "src"), ("source", "src")}


class Page(HTMLParser):
    """What a page links to, and what can be linked to in it."""

    def __init__(self, text: str) -> None:
        """Reads it all."""
        super().__init__()
        self.targets, self.links, self.loaded, self.formulas = set(), [], [], 0
        self.code, self.raw = 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        """Collects."""
        self.code += tag in ("pre", "code", "script", "style")
        self.formulas += tag == "math"
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.targets.add(value)
            if (tag, name) in LOADS:
                self.loaded.append(value)
            elif tag == "a" and name == "href":
                self.links.append(value)

    def handle_endtag(self, tag):
        """Leaves code."""
        self.code -= tag in ("pre", "code", "script", "style")

    def handle_data(self, data):
        """Finds formulas that were left as they are written."""
        if not self.code and ("\\(" in data or "\\[" in data or "$$" in data):
            self.raw.append(data.strip())


def faults(folder: Path) -> list[str]:
    """A line for each."""
    pages = {path: Page(path.read_text()) for path in folder.rglob("*.html")}
    found = []
    for path, page in pages.items():
        name = path.relative_to(folder)
        for raw in page.raw:
            found.append(f"{name}: a formula is not rendered: {raw}")
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link or "")
            if parts.scheme == "data":
                continue
            if parts.scheme or parts.netloc:
                if link in page.loaded:
                    found.append(f"{name}: loads {link}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                found.append(f"{name}: no {link}")
            elif parts.fragment and target in pages:
                missing = unquote(parts.fragment) not in pages[target].targets
                found += [f"{name}: no {link}"] * missing
    if not any(page.formulas for page in pages.values()):
        found.append("there is no formula on any page")
    return found


if __name__ == "__main__":
    lines = faults(Path(sys.argv[1]).resolve())
    print("\n".join(lines) or "No link is broken.")
    sys.exit(bool(lines))
