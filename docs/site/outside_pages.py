# SPDX-License-Identifier: Apache-2.0
"""Hook of the documentation site: add pages that lie outside `docs/`, at their path in the
repository, and rewrite links between them and the pages of `docs/`.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
PAGES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/NOTES.md",
    "benchmarks/results",
    "examples/bytes_study",
    "examples/library_of_adapters",
    "examples/multitask_digits",
    "examples/multitask_study",
)
SUFFIXES = {".md", ".png", ".svg", ".json"}
LINK = re.compile(r"(\]\()([^)#\s:]+)")


def on_files(files, config):
    """Add the outside pages and the figures and data beside them."""
    for path in sorted(_outside()):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrite relative links from places in the repository to places on the site."""
    source = page.file.src_uri
    inside = not (ROOT / source).is_file()
    folder = posixpath.dirname(f"docs/{source}" if inside else source)

    def rewrite(match):
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        on_site = target.removeprefix("docs/")
        if files.get_file_from_path(on_site) is None:
            return match[0]
        start = posixpath.dirname(source) or "."
        return match[1] + posixpath.relpath(on_site, start)

    return LINK.sub(rewrite, markdown)


def _outside():
    for name in PAGES:
        path = ROOT / name
        yield from (p for p in path.rglob("*") if p.suffix in SUFFIXES) if path.is_dir() else [path]
