"""What `make docs` adds to the pages: formulas without a script, and the source files that the pages name.

Formulas in ```math fences become MathML, which browsers draw by themselves. A source file that a page names as
`sdvae/io.py`, or links to as ../sdvae/io.py, becomes a link to a page of the site that shows the file.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
SOURCE = r"(?:sdvae|configs|scripts|tests)/[\w/]+\.(?:py|yaml)"
NAMED = re.compile(rf"(?<!\[)`({SOURCE})`(?!\])")
LINKED = re.compile(rf"\]\(\.\./({SOURCE})\)")
LANGUAGES = {".py": "python", ".yaml": "yaml"}


def on_config(config: MkDocsConfig) -> None:
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": mathml})


def mathml(source: str, *_: Any, **__: Any) -> str:
    """LaTeX -> MathML."""
    return f'<div class="math">{convert(source, display="block")}</div>'


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add a page for each source file that a page names or links to."""
    paths: set[str] = set()
    for file in files.documentation_pages():
        paths.update(NAMED.findall(file.content_string), LINKED.findall(file.content_string))
    for path in sorted(paths):
        text = (ROOT / path).read_text(encoding="utf-8")
        code = f"````{LANGUAGES[Path(path).suffix]}\n{text}\n````\n"
        content = f"---\nsearch:\n  exclude: true\nhide: [navigation, toc]\n---\n\n# {path}\n\n{code}"
        files.append(File.generated(config, source_page(path), content=content))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.src_uri.startswith("source/"):
        return markdown
    folder = posixpath.dirname(page.file.src_uri) or "."
    markdown = NAMED.sub(lambda name: f"[`{name[1]}`]({posixpath.relpath(source_page(name[1]), folder)})", markdown)
    return LINKED.sub(lambda link: f"]({posixpath.relpath(source_page(link[1]), folder)})", markdown)


def source_page(path: str) -> str:
    return f"source/{path}.md"
