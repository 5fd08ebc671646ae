"""Checks what Sphinx built: `python docs/check.py build/docs`.

Checks that every link to a page, an anchor, a picture or a stylesheet has a target, that no page
loads anything from the network, and that every formula is rendered as MathML.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {("link", "href"), ("script", "src"), ("img", "src"), ("source", "src")}


class Page(HTMLParser):
    """The links of a page, its anchors, and its formulas."""

    def __init__(self, text: str) -> None:
        """Parses the text."""
        super().__init__()
        self.targets, self.links, self.loaded, self.formulas = set(), [], [], 0
        self.code, self.raw = 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        """Collects anchors, links, loaded files and formulas."""
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
        """Notes the end of code."""
        self.code -= tag in ("pre", "code", "script", "style")

    def handle_data(self, data):
        """Collects formulas that were not rendered."""
        if not self.code and ("\\(" in data or "\\[" in data or "$$" in data):
            self.raw.append(data.strip())


def faults(folder: Path) -> list[str]:
    """Returns one line for each fault in the pages of a folder."""
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
                    found.append(f"{name}: loads {link} from the network")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                found.append(f"{name}: the link {link} has no target")
            elif parts.fragment and target in pages:
                missing = unquote(parts.fragment) not in pages[target].targets
                found += [f"{name}: the link {link} has no target"] * missing
    if not any(page.formulas for page in pages.values()):
        found.append("no page has a formula")
    return found


if __name__ == "__main__":
    lines = faults(Path(sys.argv[1]).resolve())
    print("\n".join(lines) or "No broken links.")
    sys.exit(bool(lines))
