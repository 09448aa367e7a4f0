"""Takes shell commands of the pages apart, and tells what a test does with each: run it, or check what it names.

A command that no rule here knows is an error: a new kind of command in a page needs a line here.
"""

import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from tests.docs.pages import ROOT
from tests.fuzz.run import make_parser

PROGRAMS = ("python", "python3", "pip", "%pip", "pytest", "mkdocs", "turbojax", "curl", ".")
ENVIRONMENT = {"python3 -m venv .venv", ". .venv/bin/activate"}  # what CI makes an environment of its own with
VARIABLES = {"XLA_PYTHON_CLIENT_MEM_FRACTION", "TURBOJAX_PASSWORD"}
# Commands that are made small and run; of the others, which want a GPU or hours, flags and settings are read.
SMALL_VIDEO = [f"--config.{size}" for size in ("height=32", "width=48", "num_frames=5", "num_inference_steps=1")]
SMALL = {
    "generate": SMALL_VIDEO,
    "ablate": [*SMALL_VIDEO, "--repeats=1", "--num_frames=1"],
    "convert": [],
    "merge": [],
    "make_shards": ["--height=32", "--width=48", "--num_frames=5", "--dtype=float32"],
    "train": ["--config.num_steps=2", "--config.batch_size=2", "--config.warmup_steps=1", "--config.dtype=float32"],
}
# What a size of its own is shown with runs at that size.
AS_IT_IS = ("configs/demo.py",)
PARSED = {"benchmark", "evaluate", "serve", "train_shapes"}


class Command(NamedTuple):
    """kind: "run", "parse" (of turbojax's own commands: what the words after the environment name), or "checked"."""

    text: str
    kind: str
    words: list[str]
    environment: Mapping[str, str] = MappingProxyType({})


def commands(shell: str) -> Iterator[Command]:
    """The simple commands of a block of shell, in turn; raises ValueError for one that no rule knows."""
    for line in shell.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, "&&"]:
            if word not in ("&&", "|", ";"):
                words.append(word)
            elif words:
                yield classified(words)
                words = []


def classified(words: list[str]) -> Command:
    text = shlex.join(words)
    environment = {}
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, environment[name] = words[0].partition("=")
        words = words[1:]
    if unknown := environment.keys() - VARIABLES:
        raise ValueError(f"{text}: {unknown} is no variable that a page names")
    if " ".join(words) in ENVIRONMENT:
        return Command(text, "checked", words)
    match words:
        case ["python" | "python3", "-c", _]:
            return Command(text, "run", words, environment)
        case ["python", script, *rest] if name := re.fullmatch(r"scripts/(\w+)\.py", script):
            return own(text, name[1], rest, environment)
        case ["turbojax", name, *rest] if not name.startswith("-"):
            return own(text, name, rest, environment)
        case ["python", script, *_] if script.startswith(("tests/", "docs/")):
            check((ROOT / script).is_file(), text, f"there is no {script}")
        case ["turbojax", option]:
            check(option in ("--help", "--version"), text, f"turbojax has no {option}")
        case ["python", "-m", "tests.fuzz", *rest]:
            make_parser().parse_args(rest)
        case ["python", "-m", "tests.parity", folder]:
            check((ROOT / folder).is_dir(), text, f"there is no {folder}")
        case ["pip" | "%pip", *rest]:
            check_pip(text, rest)
        case ["pytest", *paths, "-m", ""] | ["pytest", *paths]:
            check(all((ROOT / path).exists() for path in paths), text, "there are no such tests")
        case ["grep", _]:
            pass
        case ["mkdocs", *rest]:
            check_mkdocs(text, rest)
        case _:
            raise ValueError(f"{text}: no rule of {__file__} knows this command")
    return Command(text, "checked", words)


def own(text: str, name: str, rest: list[str], environment: dict[str, str]) -> Command:
    """One of turbojax's commands, in the form of the console."""
    check((ROOT / "turbojax" / "app" / "commands" / f"{name}.py").is_file(), text, f"there is no command {name}")
    words = ["turbojax", name, *rest]
    if name in PARSED or "--help" in rest:
        return Command(text, "parse", words, environment)
    if name not in SMALL:
        raise ValueError(f"{text}: {name} is neither among SMALL nor among PARSED of {__file__}")
    return Command(text, "run", words, environment)


def small(command: Command) -> list[str]:
    """The words that make a command that runs a small one."""
    if command.kind != "run" or any(f"--config={config}" in command.words for config in AS_IT_IS):
        return []
    return SMALL.get(command.words[1], [])


def check_pip(text: str, rest: list[str]) -> None:
    """Packages and extras are those of pyproject.toml, options those of pip that the pages use."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = {re.match(r"[\w-]+", package)[0] for package in project["dependencies"]}
    check(rest[0] in ("install", "wheel", "list"), text, f"no rule knows pip {rest[0]}")
    for word in rest[1:]:
        package = re.fullmatch(r"(\.|turbojax)(?:\[([\w,]+)\])?", word)
        known = word in ("-e", "--no-deps") or word in needed or package is not None
        check(known, text, f"{word} is neither this package nor one that it needs")
        named = package[2].split(",") if package and package[2] else []
        check(set(named) <= set(extras), text, f"there is no extra {word}")


def check_mkdocs(text: str, rest: list[str]) -> None:
    from mkdocs.__main__ import cli

    if rest:
        check(rest[0] in cli.commands, text, f"mkdocs has no {rest[0]}")
        cli.commands[rest[0]].make_context(rest[0], rest[1:], resilient_parsing=False)


def check(holds: bool, text: str, otherwise: str) -> None:
    if not holds:
        raise ValueError(f"{text}: {otherwise}")
