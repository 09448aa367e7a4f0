"""Paths that users give, the user's cache folder, and files and folders that appear whole or not at all.

Writing happens in a part: a hidden file or folder beside its target, which takes the target's name at the end. Its
process holds a lock on it (flock), which the system releases however the process ends. So whoever writes to the same
folder next can tell the parts of dead processes, and removes them, from those of live ones, on this host or another.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from turbojax.errors import UserError

# .video.turbojax-1a2b3c4d.part.mp4 is being written; .wan.turbojax-1a2b3c4d.old is the folder that a new one replaces.
_PART = re.compile(r"\..*\.turbojax-[0-9a-f]{8}\.part(\.[^.]*)?")
_OLD = re.compile(r"\.(?P<name>.+)\.turbojax-[0-9a-f]{8}\.old")


def user_path(path: str | os.PathLike) -> Path:
    """Returns the path that a user names, with ~ expanded; raises UserError where there is no such home folder."""
    text = os.fspath(path)
    if "\0" in text:
        raise UserError(f"{text!r} is no path: it has a NUL character; leave that out")
    found = os.path.expanduser(text)
    if found.startswith("~"):
        raise UserError(f"{text!r} names no home folder that is known; give the whole path, or ./{text} for that name")
    named = Path(found)  # which takes ./~ for ~
    return named.absolute() if str(named).startswith("~") else named


def user_cache() -> Path:
    """turbojax's folder in the user's cache, XDG_CACHE_HOME or else ~/.cache; it need not exist.

    Raises UserError where there is neither the variable nor a home folder.
    """
    # Not platformdirs: its releases 4.3 and 4.14 differ on ~ and relative paths in the variable, and without a home.
    if given := os.environ.get("XDG_CACHE_HOME"):
        return user_path(given) / "turbojax"
    try:
        return Path.home() / ".cache" / "turbojax"
    except RuntimeError as error:
        raise UserError("no home folder is known to keep a cache in; set HOME, or XDG_CACHE_HOME=FOLDER") from error


def make_folder(folder: Path) -> None:
    """Creates a folder with those above it; raises UserError where it cannot be created."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {str(folder)!r} cannot be made: {error.strerror or error}") from error


def check_file(path: str | os.PathLike) -> Path:
    """Returns the path of a file that is to be written after some work; raises UserError where it cannot be written."""
    path = user_path(path)
    with _one_sentence(path):
        _check_regular(path)
    check_parent(path)
    return path


def check_folder(folder: str | os.PathLike) -> Path:
    """Creates a folder that is to be written to after some work. Raises UserError where it cannot be written to."""
    folder = user_path(folder)
    make_folder(folder)
    check_parent(folder / "file")
    return folder


def check_parent(path: Path) -> None:
    """Makes and removes a file beside `path`, or in the first folder above that is there.

    Raises UserError where it cannot.
    """
    with _one_sentence(path):
        folder = next(parent for parent in _behind_links(path).absolute().parents if parent.exists())
        part, descriptor = _new_part(folder / path.name, folder=False)
        os.close(descriptor)
        _remove(part)


@contextlib.contextmanager
def whole_file(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields a path to write to, which takes the name `path` when the block ends well and is removed otherwise.

    There is an empty file, to be written and not to be replaced. Folders above are created. durable: its contents are
    on the disk before it takes the name. Raises UserError where it cannot be written, also for the block's OSErrors.
    """
    path = _behind_links(path)
    with _part_of(path, folder=False) as (part, lock):
        _check_regular(path)
        yield part
        if durable:
            os.fsync(lock)
        os.replace(part, path)


def write_json(path: Path, content: Any, *, indent: int | None = 1) -> None:
    """Writes content as JSON, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent) + "\n")


@contextlib.contextmanager
def whole_files(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Yields paths to write to, which take the names `paths` together when the block ends well; else none does.

    paths: files of one folder; that and those above are created. Raises UserError where they cannot be written, also
    for the block's OSErrors.
    """
    paths = [_behind_links(path) for path in paths]
    with _part_of(paths[0], folder=True) as (folder, _):
        for path in paths:
            _check_regular(path)
        parts = [folder / path.name for path in paths]
        yield parts
        for part, path in zip(parts, paths, strict=True):
            os.replace(part, path)


@contextlib.contextmanager
def whole_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder, which takes the name `path` when the block ends well and is removed otherwise.

    overwrite: a folder that is there is replaced: it is renamed, the new one takes its name, and then it is removed, so
    that one of them is whole at any moment. Where the process dies between the renames, whoever writes here next gives
    the old one its name again (`remove_stale`). Folders above are created. Raises UserError where the folder cannot be
    written, or is there and not to be replaced, also for the block's OSErrors.
    """
    path = _behind_links(path)
    with _part_of(path, folder=True) as (part, _):
        yield part
        while not _rename(part, path):
            if not overwrite:
                raise UserError(f"{str(path)!r} is there already; give another name")
            if _replace(part, path):
                break


@contextlib.contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Creates a folder, and keeps other processes out that use it by this function while the block runs.

    The lock is on its file .lock, and ends however the process ends. Raises UserError where another process has it. A
    file system without locks keeps nobody out.
    """
    make_folder(folder)
    path = folder / ".lock"
    with _one_sentence(path):
        descriptor = _open_locked(path)
    if descriptor is None:
        raise UserError(
            f"{str(folder)!r} is in use by another process; wait until it has ended, or give another folder"
        )
    with _closing(descriptor):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def _open_locked(path: Path) -> int | None:
    """A descriptor of the file, created if need be, with the lock on it; None where another process has that."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        if _lock(descriptor) is False:
            os.close(descriptor)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)  # whoever had it has removed it since


def remove_stale(folder: Path) -> None:
    """Removes what dead processes left in a folder, and gives a folder the name again that it lost to one of them."""
    try:
        names = [name for name in os.listdir(folder) if ".turbojax-" in name]
    except OSError:  # not there, or not to be read: writing to it will say so
        return
    for name in names:
        old = _OLD.fullmatch(name)
        if not (old or _PART.fullmatch(name)):
            continue
        with contextlib.suppress(OSError), _closing(_open(folder / name)) as lock:  # another process may be first
            if _lock(lock):
                _put_back(folder / name, folder / old["name"]) if old else _remove(folder / name)


@contextlib.contextmanager
def _part_of(path: Path, *, folder: bool) -> Iterator[tuple[Path, int]]:
    """Yields a locked part for a target and the lock's descriptor; in the end a part that is still there is removed."""
    make_folder(path.parent)
    remove_stale(path.parent)
    with _one_sentence(path):
        part, descriptor = _new_part(path, folder=folder)
        with _closing(descriptor) as lock:
            try:
                yield part, lock
            finally:
                with contextlib.suppress(OSError):
                    _remove(part)


def _new_part(path: Path, *, folder: bool) -> tuple[Path, int]:
    while True:
        part = path.with_name(_hidden(path.stem[:40], "part") + ("" if folder else path.suffix))
        part.mkdir() if folder else part.touch(exist_ok=False)
        try:
            lock = _open(part)
        except FileNotFoundError:  # until it is locked another process may take it for a dead one's and remove it
            continue
        if _lock(lock) is not False and part.exists():
            return part, lock
        os.close(lock)


def _replace(part: Path, path: Path) -> bool:
    """Renames the folder `path`, gives its name to `part` and removes it; False if other processes do the same here."""
    old = path.with_name(_hidden(path.name, "old"))
    with contextlib.suppress(FileNotFoundError), _closing(_open(path)) as lock:
        _lock(lock)  # so that nobody puts it back between the renames
        try:
            os.rename(path, old)
            return _rename(part, path)
        finally:
            if old.exists():
                _put_back(old, path)
    return False


def _rename(part: Path, path: Path) -> bool:
    """Gives the name `path` to a folder, unless a folder has it that is not empty."""
    try:
        os.rename(part, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _put_back(old: Path, path: Path) -> None:
    """Gives a folder its name again, or removes it where a new one has the name."""
    if not path.exists():
        os.rename(old, path)
        return
    with contextlib.suppress(OSError):  # another process was first, or the next one removes it
        dead = path.with_name(_hidden(path.name, "part"))  # what is half removed must never get the name again
        os.rename(old, dead)
        _remove(dead)


def _hidden(name: str, kind: str) -> str:
    return f".{name}.turbojax-{uuid.uuid4().hex[:8]}.{kind}"


def _open(path: Path) -> int:
    """A descriptor to lock a file or a folder by; NFS locks only what may be written."""
    mode = os.O_RDONLY if stat.S_ISDIR(os.lstat(path).st_mode) else os.O_RDWR
    return os.open(path, mode | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Locks a file until its descriptor is closed; False if another has it locked, None if the system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove(path: Path) -> None:
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    try:
        shutil.rmtree(path)
    except KeyboardInterrupt:  # a stop is no reason to leave gigabytes; a second one is
        shutil.rmtree(path, ignore_errors=True)
        raise


def _check_regular(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise UserError(f"{str(path)!r} cannot be written: it is no regular file; give another name")


def _behind_links(path: Path) -> Path:
    """Returns the file or folder behind a link, which stays a link and is not replaced itself."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path


@contextlib.contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
