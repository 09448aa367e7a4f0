"""The console command: `turbojax COMMAND --flag=VALUE`, where a command is a module of this folder, with its own flags.

scripts/COMMAND.py runs the same module. A module is imported when its command is called, and no other.
"""

import ast
import importlib
import pkgutil
import sys
from pathlib import Path

from turbojax import __version__
from turbojax.app import cli
from turbojax.config import did_you_mean
from turbojax.errors import UserError

NAMES = sorted(module.name for module in pkgutil.iter_modules(__path__))


def main() -> None:
    """Hands the command line to the command that its first word names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(usage())
    elif name == "--version":
        print(__version__)
    elif name in NAMES:
        sys.argv = [f"turbojax {name}", *arguments]
        run(name)
    else:
        cli.fail(UserError(f"there is no command {name}{did_you_mean(name, NAMES)}; choose {', '.join(NAMES)}"))


def run(name: str) -> None:
    """Runs main of a command's module by its FLAGS, its docstring as the help, and its OPTIONS of `cli.run`, if any."""
    module = importlib.import_module(f"{__name__}.{name}")
    cli.run(module.main, flag_values=module.FLAGS, help_text=module.__doc__ or "", **getattr(module, "OPTIONS", {}))


def usage() -> str:
    """Returns a line a command: the first of its docstring, which is read without importing the module."""
    width = max(map(len, NAMES))
    lines = ["turbojax COMMAND --flag=VALUE ...    for instance: turbojax generate --config=demo", ""]
    for name in NAMES:
        tree = ast.parse(Path(__path__[0], f"{name}.py").read_text())
        lines.append(f"  {name:{width}}  {(ast.get_docstring(tree) or '').partition(chr(10))[0]}")
    return "\n".join([*lines, "", "turbojax COMMAND --help tells a command's flags."])
