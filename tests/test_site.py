"""The documentation as a site: it builds without a warning, and its notebooks run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def test_the_site_builds_with_every_link_and_the_notebooks_run(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    # The links of the repository's first page are those of the site's.
    assert 'href="docs/python/"' in (tmp_path / "index.html").read_text(encoding="utf-8")
    for notebook in NOTEBOOKS:
        page = tmp_path / "docs" / "notebooks" / notebook.stem
        assert f'src="{notebook.stem}_' in (page / "index.html").read_text(encoding="utf-8")
        assert list(page.glob("*.png"))
    assert "doc-signature" in (tmp_path / "docs" / "api" / "index.html").read_text(encoding="utf-8")


def test_notebooks_are_kept_without_outputs() -> None:
    assert len(NOTEBOOKS) == 3
    for notebook in NOTEBOOKS:
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            assert not cell.get("outputs")
            assert cell.get("execution_count") is None
