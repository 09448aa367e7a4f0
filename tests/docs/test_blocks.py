"""Every command and every piece of Python of the pages works: run with small networks, or read by the real parsers.

The repositories and files that the commands name are in a folder of their own, with networks of a few layers.
"""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.docs.commands import PROGRAMS, Command, commands, small
from tests.docs.pages import PAGES, ROOT, blocks, code, indented
from tests.docs.sandbox import fill
from tests.marks import slow
from turbojax.app.commands import NAMES
from turbojax.config import SETTINGS, parse_value
from turbojax.train.config import TRAIN_SETTINGS

# What is written in a piece of Python, and what is run; each is used.
SMALLER = {
    "height=480, width=832, num_frames=81": "height=32, width=48, num_frames=5",
    'seed=1, output="cat.mp4")': 'seed=1, output="cat.mp4", height=32, width=48, num_frames=5, num_inference_steps=1)',
    'output="cat.mp4", **settings)': 'output="cat.mp4", num_inference_steps=1, **settings)',
    "batch_size=64": "batch_size=2",
}
# Docstrings that --help and readers of configurations are shown.
SOURCES = [*sorted((ROOT / "turbojax" / "app" / "commands").glob("*.py")), *sorted((ROOT / "configs").glob("*.py"))]
BLOCKS = [block for page in PAGES for block in blocks(page)]


Job = tuple[str, list[str], dict[str, str]]  # as tests/docs/run_commands.py takes them


def jobs_of(block) -> list[Job]:
    """What is done with a block, in turn."""
    if block.language == "python":
        text = block.text
        for written, run in SMALLER.items():
            text = text.replace(written, run)
        return [("python", [text], {})]
    if block.language == "text":
        typed = re.findall(r"^prompt> (.*)$", block.text, re.MULTILINE)
        if not typed:
            return []
        command = session(block)
        return [("session", [*command.words, *small(command), "\n".join([*typed, "/quit"])], {})]
    if "curl" in block.text:
        return []  # tests/docs/test_http.py
    return [
        (c.kind, c.words + small(c), dict(c.environment))
        for c in commands(block.text)
        if c.kind != "checked" and not typed_into(c)
    ]


def typed_into(command: Command) -> bool:
    return "--interactive" in command.words


def session(block) -> Command:
    """The command of the page whose session this is."""
    shell = [other for other in blocks(block.page) if other.language == "bash"]
    (found,) = [command for other in shell for command in commands(other.text) if typed_into(command)]
    return found


def named(words: str) -> list[Job]:
    """What a sentence names between backticks; a command of ours is read, whatever else it is was checked."""
    if words.split()[0] not in PROGRAMS or " " not in words:
        return []
    found = list(commands(words))
    return [("parse", c.words, {}) for c in found if c.words[0] == "turbojax" and c.kind != "checked"]


def shown(source: Path) -> list[Job]:
    """The commands of a docstring, which are indented."""
    text = (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").replace("\\\n", " ")
    lines = re.findall(r"^    ((?:[A-Z_]+=\S+ )?(?:python|turbojax) .*)$", text, re.MULTILINE)
    return [("parse", c.words, {}) for line in lines for c in commands(line) if c.kind != "checked"]


WRONG: list[Job] = [  # each fails, or the runner sees nothing
    ("parse", ["turbojax", "generate", "--config=configs/demo.py", "--config.resolution=1080p"], {}),
    ("parse", ["turbojax", "generate", "--config=configs/demo.py", "--config.promt=x"], {}),
    ("parse", ["turbojax", "benchmark", "--case=everything"], {}),
    ("run", ["turbojax", "convert", "--input=nothing.pth", "--output=x.safetensors"], {}),
    ("python", ["import turbojax; turbojax.nothing"], {}),
]


def jobs_or_why(find: Callable[..., list[Job]], place: Any) -> list[Job]:
    """A job that fails in place of those of a command that no rule knows."""
    try:
        return find(place)
    except ValueError as why:
        return [("python", [f"raise ValueError({str(why)!r})"], {})]


def in_sentences(page: Path) -> list[Job]:
    return [job for words in code(page) for job in jobs_or_why(named, words)]


JOBS = {str(block): jobs_or_why(jobs_of, block) for block in BLOCKS}
JOBS |= {f"{page.relative_to(ROOT)}, sentences": in_sentences(page) for page in PAGES}
JOBS |= {str(source.relative_to(ROOT)): jobs_or_why(shown, source) for source in SOURCES}
JOBS["wrong"] = WRONG


def quick(name: str) -> bool:
    """True for README's commands, and for those that are only read."""
    return name.startswith("README") or all(kind == "parse" for kind, *_ in JOBS[name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    fill(folder)
    return folder


@pytest.fixture(scope="module")
def results(folder, request):
    """(job, error or None, output) of every job that a test asks for, by where it is from."""
    items = [item for item in request.session.items if item.path == Path(__file__)]
    wanted = {item.callspec.params.get("name") for item in items if hasattr(item, "callspec")} | {"wrong"}
    chosen = {name: jobs for name, jobs in JOBS.items() if name in wanted}
    target = folder / "results.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.docs.run_commands", target],
        input=json.dumps([job for jobs in chosen.values() for job in jobs]),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    done_jobs = iter(json.loads(target.read_text()))
    return {name: [(job, *next(done_jobs)) for job in jobs] for name, jobs in chosen.items()}


@pytest.mark.parametrize("name", [name if quick(name) else slow(name) for name in JOBS if name != "wrong"])
def test_commands_work(name, results, folder):
    for job, error, output in results[name]:
        assert error is None, f"{job}\n{output}\n{error}"
        for word in job[1] if job[0] == "run" else ():
            if re.match(r"--(config\.)?out(put)?=.*", word) and "--prompts_file=prompts.txt" not in job[1]:
                assert (folder / word.partition("=")[2]).exists(), word


def test_what_is_wrong_fails(results):
    assert [job for job, error, _ in results["wrong"] if error is None] == []


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_blocks_have_a_language_that_a_rule_is_for(block):
    assert block.language in ("bash", "python", "text"), block
    assert block.language == "text" or jobs_of(block) or "curl" in block.text or all_checked(block)


def all_checked(block) -> bool:
    return all(command.kind == "checked" or typed_into(command) for command in commands(block.text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_are_fenced(page):
    assert not indented(page)


@pytest.mark.slow
@pytest.mark.parametrize("name", [str(block) for block in BLOCKS if "prompt>" in block.text])
def test_session_shows_what_the_page_shows(name, results):
    (block,) = [block for block in BLOCKS if str(block) == name]
    ((_, _, output),) = results[name]
    lines = [line for line in block.text.splitlines() if not line.startswith("prompt> ")]
    assert not [line for line in lines if without_seconds(line) not in without_seconds(output)], output


def without_seconds(text: str) -> str:
    return re.sub(r"\d+\.\d s", "N s", text)


def test_every_change_of_python_is_used():
    written = "".join(block.text for block in BLOCKS if block.language == "python")
    assert not [text for text in SMALLER if text not in written]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_and_flags_of_sentences(page):
    names = {setting.name for setting in (*SETTINGS, *TRAIN_SETTINGS)}
    own = {setting.name for setting in SETTINGS}
    modules = [importlib.import_module(f"turbojax.app.commands.{name}") for name in NAMES]
    flags = {flag for module in modules for flag in module.FLAGS} | {"help"}
    for words in code(page):
        for name, value in re.findall(r"--config\.([a-z_]\w*)=([^\s`]*)", words):
            assert name in names, words
            if name in own and value:
                parse_value(name, value)
        if words.startswith("--"):
            assert re.match(r"--(\w+)", words)[1] in flags, words


@pytest.mark.parametrize("shell", ["rm -rf outputs", "pip install torch", "turbojax fly --config=demo", "A=1 pytest"])
def test_a_command_that_no_rule_knows_is_an_error(shell):
    with pytest.raises(ValueError, match=re.escape(shell.split()[0])):
        list(commands(shell))
