"""Running of commands: flags, --help, and errors as one sentence with exit code 2."""

import functools
import logging as standard_logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from turbojax.app.signals import ending_in_order, exit_code
from turbojax.config import CONFIGS, SETTINGS, Setting, check_names, describe_settings
from turbojax.errors import UserError
from turbojax.files import user_path
from turbojax.memory.planner import short_of_memory
from turbojax.pipeline.program_cache import use_compilation_cache

USAGE = 2
LESS_MEMORY = "memory=stream, quant_linear=True, a smaller resolution, or fewer num_frames or num_samples"


def run(
    main: Callable[[], None],
    *,
    help_text: str,
    flag_values: flags.FlagValues = flags.FLAGS,
    lists: Sequence[str] = (),
    settings: Sequence[Setting] = SETTINGS,
    less_memory: str = LESS_MEMORY,
) -> None:
    """Parses the flags and calls main; what the user can mend is printed without a traceback.

    flag_values: the command's own flags; absl's are taken beside them. lists: flags that take several words.
    settings: the names that --config.NAME= may have. less_memory: which of them to set where memory is not enough.
    """
    if {"--help", "-h", "--helpfull", "--helpshort"} & set(sys.argv[1:]):
        listed = "\n" + describe_settings(settings) if "config" in flag_values else ""
        print(as_called((help_text + listed).strip()))
        sys.exit(0)

    def guarded(arguments: Sequence[str]) -> None:
        try:
            if len(arguments) > 1:
                raise UserError(f"unexpected argument {arguments[1]!r}; flags start with --, see --help")
            use_compilation_cache()
            with ending_in_order():
                main()
        except UserError as error:
            fail(error)
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not short_of_memory(error):
                raise
            fail(UserError(f"memory is not enough for this; set {less_memory}"))
        except OSError as error:  # no closer place has said what it means
            logging.debug("%s", error, exc_info=True)
            what = f"{error.filename!r}" if error.filename else "a file"
            fail(UserError(f"{what} cannot be used: {error.strerror or error}; mend that, or name another place"))
        except KeyboardInterrupt as stop:
            print("stopped", file=sys.stderr)
            sys.exit(exit_code(stop))

    app.run(guarded, flags_parser=functools.partial(parse, flag_values=flag_values, lists=lists, settings=settings))


def define_config(flag_values: flags.FlagValues, files: str = "configs/") -> flags.FlagHolder:
    """Defines --config, a file of settings, and --config.NAME for each of them."""
    text = f"file of settings, see {files}"
    return config_flags.DEFINE_config_file("config", None, text, lock_config=True, flag_values=flag_values)


def as_called(help_text: str) -> str:
    """Returns the help for the console command if that was called: there may be no scripts/ and configs/."""
    if not sys.argv[0].startswith("turbojax "):
        return help_text
    return re.sub(r"\bconfigs/(\w+)\.py", r"\1", re.sub(r"\b(python )?scripts/(\w+)\.py", r"turbojax \2", help_text))


def parse(
    arguments: Sequence[str], *, flag_values: flags.FlagValues, lists: Sequence[str], settings: Sequence[Setting]
) -> list[str]:
    """Parses the command line; whatever is wrong with it ends the program with one sentence."""
    if flag_values is not flags.FLAGS:
        flag_values.append_flag_values(flags.FLAGS)
        flags.FLAGS.mark_as_parsed()
    try:
        positional = flag_values(find_configs(one_word_each(arguments, lists), settings))
    except Exception as error:  # a file of settings is Python: it may raise anything
        fail(UserError(f"{describe(error)}; see --help"))
    logging.use_absl_handler()
    standard_logging.getLogger("jax").setLevel(standard_logging.WARNING)  # it tells of each backend that is not there
    logging.set_verbosity(max(logging.get_verbosity(), logging.INFO))
    logging.set_stderrthreshold("info")
    return positional


def describe(error: BaseException) -> str:
    """Returns an error as one line; of a file of settings, whose traceback ml_collections quotes, what it raised."""
    quotes = "Traceback" in str(error)
    while quotes and error.__context__:
        error = error.__context__
    text = " ".join(str(error).split())
    if isinstance(error, flags.Error | UserError):
        return text
    return f"the settings cannot be read, {type(error).__name__}: {text}"


def read_config(flag: flags.FlagHolder, *, example: str, settings: Sequence[Setting] = SETTINGS) -> ConfigDict:
    """Returns the configuration that --config= names, with all settings; example: a file of them."""
    if not flag.present:
        raise UserError(f"no settings; give --config=configs/NAME.py, for instance {example}")
    try:
        missing = [setting.name for setting in settings if setting.name not in flag.value]
    except (OSError, TypeError) as error:  # get_config() could not read a file, or returned something else
        raise UserError(f"the settings cannot be read, {error}") from error
    if missing:
        raise UserError(f"get_config() must return all settings, as {example} does; missing: {', '.join(missing)}")
    return flag.value


def one_word_each(arguments: Sequence[str], lists: Sequence[str]) -> list[str]:
    """Returns --grid a b as --grid=a --grid=b, for the flags named."""
    words, current = [], ""
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if argument.startswith("-"):
            current = argument if name.lstrip("-") in lists and not equals else ""
            words += [] if current else [argument]
        else:
            words.append(f"{current}={argument}" if current else argument)
    return words


def find_configs(arguments: Sequence[str], settings: Sequence[Setting]) -> list[str]:
    """Returns the arguments with --config= as a file that is there: the one named, or the package's.

    Raises UserError for a file or a setting that is not there, before the libraries say it in their words.
    """
    found, rest = [], iter(arguments)
    for argument in rest:
        if argument.startswith(("--config.", "-config.")):
            check_names([argument.partition("=")[0].partition(".")[2]], settings)
        if argument in ("--config", "-config"):
            value = next(rest, None)
            argument = argument if value is None else f"--config={value}"
        if argument.startswith(("--config=", "-config=")):
            path, colon, variant = argument.partition("=")[2].partition(":")
            argument = f"--config={find_config(path)}{colon}{variant}"
        found.append(argument)
    return found


def find_config(path: str) -> Path:
    """Returns a file of settings; NAME and configs/NAME.py outside the checkout are the package's."""
    packaged = CONFIGS / f"{Path(path).stem}.py"
    named = path in (packaged.stem, f"configs/{packaged.name}")
    for file in (user_path(path), packaged):
        if file.is_file() and (file is not packaged or named):
            return file
    names = sorted(file.stem for file in CONFIGS.glob("*.py"))
    raise UserError(f"--config={path} is no file; give one, or a name: {', '.join(names)}")


def fail(error: Exception) -> None:
    """Prints an error and ends the program with exit code 2."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(USAGE)
