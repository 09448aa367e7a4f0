"""The documentation's build: pages from outside docs/, and tables that must be what `tables.py` makes."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from tables import renewed

# Pages that lie elsewhere in the checkout; links to them, and theirs into docs/, lead to the pages of the site.
PAGES = {
    "index.md": "README.md",
    "small-model.md": "turbojax/shapes/model/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}


def on_files(files: Files, *, config: MkDocsConfig) -> None:
    root = Path(config.config_file_path).parent
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=as_page((root / source).read_text(encoding="utf-8"))))


def as_page(markdown: str) -> str:
    """A page's links as seen from docs/, where README's are seen from the checkout."""
    for page, source in PAGES.items():
        markdown = markdown.replace(f"]({source})", f"]({page})")
    return markdown.replace("](docs/", "](")


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> None:
    if renewed(markdown) != markdown:
        raise PluginError(f"{page.file.src_uri}: a table is not what the code gives; run python docs/tables.py")
