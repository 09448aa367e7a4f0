"""Imports point down: the contract of pyproject.toml holds, and the architecture's page shows its order."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    section = ARCHITECTURE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [line.strip("|").split("|") for line in lines[2:]]


def test_imports_keep_the_contract():
    command = [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_shows_the_rooms_in_the_order_of_the_contract():
    (layers,) = [contract["layers"] for contract in CONTRACTS if contract["type"] == "layers"]
    rooms = [room for layer in layers for room in re.findall(r"\w+", layer)]
    assert [re.search(r"`(\w+)", row[0])[1] for row in rows("Rooms")] == rooms


def test_every_file_of_the_index_is_there():
    named = [name for row in rows("Where is ...?") for name in re.findall(r"`([\w/]+\.py)`", row[1])]
    assert named
    assert not [name for name in named if not (ROOT / "turbojax" / name).is_file()]
