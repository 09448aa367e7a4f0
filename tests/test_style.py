"""Docstrings and names of turbojax/ keep the project's style; see CONTRIBUTING.md."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "turbojax"
MODULES = sorted(PACKAGE.rglob("*.py"))
# What a docstring does not begin with: it begins with a verb, or names the thing.
OPENINGS = ("What", "Of", "Whether", "As")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Words of this project's own that gave way to those of the field, each with the one to use.
REPLACED = {
    r"\b(the|a|its|your) cards?\b": "the GPU",
    r"\ba layer ahead\b": "prefetched one layer ahead",
    r"\bshare of (the )?key blocks\b": "fraction of key blocks",
    r"\bidle_in_host\b": "idle_offloaded",
    r"\bembeddings_(wait|away|here)\b": "embeddings_offloaded",
    r"\b(take_the_place_of|make_room)\b": "swap_with, release",
    r"\bin_turn\b": "swap_experts",
    r"\bway_out\b": "suggestion",
    r"\b(Temporaries|temporaries)\b": "temporary memory",
    r"\buntold\b": "no_progress",
    r"\brun_kind\b": "run_signature",
    r"\bStudio\b": "PipelineCache",
    r"\bRUN_WITH\b": "INFERENCE_DEFAULTS",
    r"\b(PlainCheckpoint|load_plain)\b": "encoders",
    r"\bsoften\b": "softmax_step",
    r"\b\w*obstacle\b": "unsupported",
}


def openings(tree: ast.AST) -> list[tuple[str, str]]:
    """The name and the first words of every docstring."""
    documented = [node for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
    texts = [(getattr(node, "name", "the module"), ast.get_docstring(node) or "") for node in documented]
    return [(name, " ".join(text.split()[:5])) for name, text in texts]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_style(path):
    source = path.read_text(encoding="utf-8")
    found = openings(ast.parse(source))
    assert not [(name, words) for name, words in found if re.match(rf"({'|'.join(OPENINGS)})\b", words)]
    assert {word[0]: better for term, better in REPLACED.items() for word in re.finditer(term, source)} == {}
