"""Links and file names of the pages lead somewhere, on GitHub and on the site, which is built as README says."""

import importlib
import re
import subprocess
import sys

import pytest

from tests.docs.pages import MEASUREMENTS, PAGES, ROOT, anchors, code, links

BUILD = "mkdocs build --strict"
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@every_page
def test_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@every_page
def test_files_named_in_sentences_are_there(page):
    """Those under folders of the checkout; `*` stands for some."""
    named = [word for words in code(page) for word in re.split(r"[\s=,]+", words)]
    for name in named:
        if re.match(r"(turbojax|configs|scripts|tests|docs|benchmarks|notebooks)/[\w./*-]+$", name):
            assert list(ROOT.glob(name.removesuffix("/"))), f"{page.name}: {name}"


def test_measurements_are_quoted():
    """A file of benchmarks/ that no page tells of is of no use to a reader."""
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    folder = MEASUREMENTS.parent
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert not [name for name in files if name != MEASUREMENTS.name and f"{name}`" not in pages]


def test_the_list_of_measurements_is_what_tables_makes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    text = MEASUREMENTS.read_text(encoding="utf-8")
    assert importlib.import_module("tables").renewed(text) == text, "run python docs/tables.py"


def test_checks_build_the_site_as_readme_says():
    assert any(words.endswith(BUILD) for words in code(ROOT / "README.md"))
    (build,) = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("mkdocs")]
    assert build.startswith(BUILD)
    assert not re.search(r"--quiet|-q\b", build.partition("#")[0])  # it hides warnings from --strict


@pytest.mark.slow  # .ci/run builds it, too
def test_site(tmp_path):
    command = [sys.executable, "-m", *BUILD.split(), f"--site-dir={tmp_path}"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    assert (tmp_path / "small-model" / "index.html").is_file()
