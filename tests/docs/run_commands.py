"""Runs turbojax' commands and pieces of Python one after the other in one process, which loads each network once.

Reads [[kind, words, environment], ...] as JSON from stdin and writes [[error or null, output], ...] as JSON to the
file named. Kinds: "run" and "parse" (words are a command line, done or only read), "python" (one word, the code),
"session" (a command line, and as its last word what is typed).
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import os
import sys
import traceback
from pathlib import Path
from unittest import mock

from turbojax.app import commands, generate
from turbojax.train.config import make_recipe

load_pipeline = generate.load_pipeline
pipelines = {}


def loaded(options, prepare=None):
    """The pipeline of these options, loaded at the first call."""
    key = dataclasses.replace(options, weights=Path(options.weights).resolve())
    if key not in pipelines:
        pipelines[key] = load_pipeline(options, prepare)
    return pipelines[key]


def only_parse(module) -> None:
    """Reads the settings in place of the command's work, as far as that is quick."""
    if "CONFIG" not in vars(module) or not module.CONFIG.present:
        return
    config = module.CONFIG.value
    if "recipe" in config:
        make_recipe(config)
    else:
        generate.read_settings(config)


def command(words: list[str], *, parse: bool = False) -> None:
    """A command line in this process; raises SystemExit where it ends with another exit code than 0."""
    name = words[1] if len(words) > 1 else ""
    sys.modules.pop(f"turbojax.app.commands.{name}", None)  # flags keep their values
    if parse:
        module = importlib.import_module(f"turbojax.app.commands.{name}")
        module.main = functools.partial(only_parse, module)
    with mock.patch.object(sys, "argv", list(words)):
        try:
            commands.main()
        except SystemExit as end:
            if end.code not in (None, 0):
                raise


def run(kind: str, words: list[str], environment: dict[str, str]) -> None:
    with mock.patch.dict(os.environ, environment):
        if kind == "python" or words[1:2] == ["-c"]:
            exec(compile(words[-1], "page", "exec"), {"__name__": "page"})
        elif kind == "session":
            *words, typed = words
            with mock.patch.object(sys, "stdin", io.StringIO(typed)):
                command(words)
        else:
            command(words, parse=kind == "parse")


def main(target: str) -> None:
    generate.load_pipeline = loaded
    results = []
    for kind, words, environment in json.load(sys.stdin):
        output, error = io.StringIO(), None
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                run(kind, words, environment)
            except BaseException:
                error = traceback.format_exc()
        results.append([error, output.getvalue()])
        Path(target).write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
