"""The documentation's build: README is the front page, and tables must be what `tables.py` makes."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from tables import renewed


def on_files(files: Files, *, config: MkDocsConfig) -> None:
    """README's links are seen from docs/."""
    readme = Path(config.config_file_path).with_name("README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=readme.replace("](docs/", "](")))


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> None:
    if renewed(markdown) != markdown:
        raise PluginError(f"{page.file.src_uri}: a table is not what the code gives; run python docs/tables.py")
