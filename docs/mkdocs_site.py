"""What mkdocs.yml makes its site with: the repository's own layout, and the notebooks as they run.

Every page has the place on the site that it has in the repository, so that a link from docs/ to README.md, to
training/ or to a test is the same in both. What isn't in docs/ is on the site where something links to it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
_NOTEBOOK_LINK = re.compile(r"(\]\([^)\s:]+)\.ipynb\b")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The theme's files, the pages of docs/ below docs/, and all that they link to in the repository."""
    own = [ROOT / "docs" / file.src_uri for file in files if file.src_dir == config.docs_dir]
    served = {file.src_uri: file for file in files if file.src_dir != config.docs_dir}
    notebooks = sorted(path for path in own if path.suffix == ".ipynb")
    waiting = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
    waiting += [path for path in own if path.suffix == ".md"]
    for path, notebook in zip(notebooks, asyncio.run(_executed(notebooks)), strict=True):
        for page in _pages(path, notebook, config):
            served[page.src_uri] = page
    while waiting:
        path = waiting.pop()
        name = path.relative_to(ROOT).as_posix()
        if name in served or path in notebooks:
            continue
        served[name] = File.generated(config, name, abs_src_path=str(path))
        if path.suffix == ".md":
            waiting += _linked(path)
    return Files(list(served.values()))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to notebooks are links to their pages."""
    return _NOTEBOOK_LINK.sub(r"\1.md", markdown)


def _linked(page: Path) -> Iterator[Path]:
    """The files of the repository that a page links to."""
    for target in _LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve()
        if path.is_file() and path.is_relative_to(ROOT):
            yield path


async def _executed(paths: list[Path]) -> list[Any]:
    """Notebooks with their outputs. What a cell raises ends the build."""
    notebooks = [nbformat.read(path, as_version=4) for path in paths]
    clients = [
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}})
        for path, notebook in zip(paths, notebooks, strict=True)
    ]
    await asyncio.gather(*(client.async_execute() for client in clients))
    return notebooks


def _pages(path: Path, notebook: Any, config: MkDocsConfig) -> Iterator[File]:
    """A notebook as a page, and its pictures."""
    for cell in notebook.cells:
        # Bars and what libraries have to say.
        cell["outputs"] = [each for each in cell.get("outputs", []) if each.get("name") != "stderr"]
    resources = {"unique_key": path.stem, "output_files_dir": path.stem}
    text, made = MarkdownExporter().from_notebook_node(notebook, resources)
    page = path.with_suffix(".md").relative_to(ROOT)
    yield File.generated(config, page.as_posix(), content=text)
    for name, picture in made["outputs"].items():
        yield File.generated(config, (page.parent / name).as_posix(), content=picture)
