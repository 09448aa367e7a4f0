"""Paths, and files and folders that appear whole: what is left by processes that die, or work at the same time."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from turbojax import files
from turbojax.errors import UserError
from turbojax.files import (
    check_file,
    check_folder,
    make_folder,
    remove_stale,
    sole_user,
    user_cache,
    user_path,
    whole_file,
    whole_folder,
)

PART, OLD = ".x.turbojax-0123abcd.part", ".x.turbojax-0123abcd.old"


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def written(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(path.name)
    return path


def test_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x.mp4") == tmp_path / "x.mp4"
    assert user_path(Path("a/~/x")) == Path("a/~/x")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
    assert user_cache() == tmp_path / "cache" / "turbojax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache() == tmp_path / ".cache" / "turbojax"
    with pytest.raises(UserError, match=r"'~nobody-here/x' names no home folder that is known; .* or ./~nobody-here/x"):
        user_path("~nobody-here/x")
    monkeypatch.chdir(tmp_path)
    assert user_path(user_path("./~nobody-here/x")) == tmp_path / "~nobody-here" / "x"
    with pytest.raises(UserError, match="NUL"):
        user_path("x\0.mp4")


def test_no_home(monkeypatch):
    """Containers have users whom the system does not know."""
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(UserError, match=r"no home folder is known .* set HOME, or XDG_CACHE_HOME=FOLDER"):
        user_cache()
    with pytest.raises(UserError, match="'~/x' names no home folder that is known"):
        user_path("~/x")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "x.txt"
    with whole_file(path, durable=True) as part:
        assert part.parent == path.parent
        assert part.suffix == ".txt"
        part.write_text("first")
        assert not path.exists()
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), whole_file(path):
            raise error
    with pytest.raises(UserError, match=r"x.txt' cannot be written: No space left"), whole_file(path):
        raise OSError(28, "No space left on device")
    assert path.read_text() == "first"
    assert names(tmp_path) == ["new/x.txt"]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_what_is_no_file_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(UserError, match="it is no regular file"), whole_file(tmp_path / name):
            pass
    (tmp_path / "link").symlink_to(written(tmp_path / "elsewhere" / "x"))
    with whole_file(tmp_path / "link") as part:
        part.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "x").read_text() == "new"
    with pytest.raises(UserError, match=r"the folder .*elsewhere/x' cannot be made: File exists"):
        make_folder(tmp_path / "elsewhere" / "x")
    with pytest.raises(UserError, match="cannot be written: File name too long"), whole_file(tmp_path / ("x" * 300)):
        pass


def test_what_can_be_written_is_known_before(tmp_path, monkeypatch):
    written(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    assert check_file(tmp_path / "new" / "deep" / "x.json").name == "x.json"
    for name in ("folder", "file/x", "file/new/x", "x" * 300):
        with pytest.raises(UserError, match=f"{name}' cannot be written: "):
            check_file(tmp_path / name)
    with pytest.raises(UserError, match="file' cannot be made: File exists"):
        check_folder(tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert check_folder(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"

    def read_only(*arguments, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "touch", read_only)  # root may write to folders of any mode
    for check in (check_file, check_folder):
        with pytest.raises(UserError, match="cannot be written: Read-only file system"):
            check(tmp_path / "new" / "x")
    assert names(tmp_path) == ["file"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "x"
    with whole_folder(path) as part:
        written(part / "first")
        assert not path.exists()
    with pytest.raises(UserError, match="x' is there already; give another name"), whole_folder(path):
        pass
    with pytest.raises(KeyboardInterrupt), whole_folder(path, overwrite=True):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["new/x/first"]
    (tmp_path / "link").symlink_to(path)
    with whole_folder(tmp_path / "link", overwrite=True) as part:
        written(part / "second")
    assert names(tmp_path) == ["new/x/second"]
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "new") == ["x"]


def steps(monkeypatch, stop_at: int, how: type[BaseException]) -> list[str]:
    """Has the stop_at-th change of a name, or removal, raise; those that come are in the list."""
    seen: list[str] = []

    def counting(name):
        real = getattr(os, name)

        def step(*arguments, **options):
            seen.append(name)
            if len(seen) == stop_at:
                raise how
            return real(*arguments, **options)

        return step

    for name in ("rename", "rmdir", "unlink"):
        monkeypatch.setattr(os, name, counting(name))
    return seen


def replace(path: Path) -> None:
    with whole_folder(path, overwrite=True) as part:
        written(part / "new" / "a")
        written(part / "new" / "b")


def test_a_stop_at_any_step_loses_no_folder(tmp_path, monkeypatch):
    """Replacing one: the old or the new one is whole and has the name, and nothing else is left."""
    for stop_at in range(1, 100):
        path = tmp_path / str(stop_at) / "x"
        written(path / "old")
        with monkeypatch.context() as patch:
            seen = steps(patch, stop_at, KeyboardInterrupt)
            with contextlib.suppress(KeyboardInterrupt):
                replace(path)
        remove_stale(path.parent)
        assert os.listdir(path.parent) == ["x"]
        assert names(path) in (["old"], ["new/a", "new/b"])
        if len(seen) < stop_at:
            break
    assert stop_at > 4


DIE = """
import os, sys
from pathlib import Path
from turbojax.files import whole_folder

def dying(real):
    def step(*arguments, **options):
        global seen
        seen += 1
        if seen == stop_at:
            os._exit(9)
        return real(*arguments, **options)
    return step

for stop_at in range(1, 100):
    child = os.fork()
    if not child:
        seen = 0
        for name in ("rename", "rmdir", "unlink"):
            setattr(os, name, dying(getattr(os, name)))
        with whole_folder(Path(sys.argv[1], str(stop_at), "x"), overwrite=True) as part:
            (part / "new").mkdir()
            for name in "ab":
                (part / "new" / name).write_text(name)
        os._exit(0)
    if not os.waitpid(child, 0)[1]:
        break
print(stop_at)
"""


def test_a_death_at_any_step_loses_no_folder(tmp_path):
    """Ends as by SIGKILL: whoever comes next finds the old or the new one, and nothing else stays."""
    for stop_at in range(1, 10):
        written(tmp_path / str(stop_at) / "x" / "old")
    count = int(subprocess.run([sys.executable, "-c", DIE, str(tmp_path)], stdout=subprocess.PIPE, check=True).stdout)
    assert 4 < count < 10
    for stop_at in range(1, count):
        folder = tmp_path / str(stop_at)
        remove_stale(folder)
        assert os.listdir(folder) == ["x"]
        assert names(folder / "x") in (["old"], ["new/a", "new/b"])


LIVE = """
import sys
from pathlib import Path
from turbojax.files import whole_file, whole_folder
with whole_file(Path(sys.argv[1], "x.bin")) as file, whole_folder(Path(sys.argv[1], "x")) as folder:
    print(file.name, folder.name, flush=True)
    sys.stdin.read()
"""


def test_parts_of_the_dead_are_removed_and_those_of_the_living_kept(tmp_path):
    foreign = written(tmp_path / ".x.part"), written(tmp_path / ".x.turbojax-notes.part")
    command = [sys.executable, "-c", LIVE, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdin
        parts = [tmp_path / name for name in process.stdout.readline().split()]
        written(parts[1] / "array")
        written(tmp_path / PART)
        written(tmp_path / f"{PART}.mp4")
        written(tmp_path / ".y.turbojax-0123abcd.part" / "arrays" / "a")
        with whole_file(tmp_path / "x.txt"):
            assert all(part.exists() for part in parts)
            assert len(os.listdir(tmp_path)) == len(parts) + len(foreign) + 1
        process.kill()
        process.wait()
    with whole_file(tmp_path / "x.txt"):
        pass
    assert sorted(tmp_path.iterdir()) == sorted([*foreign, tmp_path / "x.txt"])


def test_a_link_in_a_parts_place_is_not_followed(tmp_path):
    target = written(tmp_path / "elsewhere" / "x")
    (tmp_path / PART).symlink_to(target)
    (tmp_path / OLD).symlink_to(target.parent)
    os.mkfifo(tmp_path / f"{PART}.mp4")
    remove_stale(tmp_path)
    assert target.exists()


def test_a_part_that_is_taken_for_a_dead_ones(tmp_path, monkeypatch):
    """Before it is locked another process may remove it: another one is made."""
    real, removed = files._open, []

    def late(path):
        if not removed:
            removed.append(path)
            path.unlink()
        return real(path)

    monkeypatch.setattr(files, "_open", late)
    with whole_file(tmp_path / "x") as part:
        part.write_text("x")
    assert removed
    assert names(tmp_path) == ["x"]


REPLACE = """
import os, sys
from pathlib import Path
from turbojax.files import whole_folder

children = []
for _ in range(3):
    children.append(os.fork())
    if not children[-1]:
        try:
            for _ in range(50):
                with whole_folder(Path(sys.argv[1]), overwrite=True) as part:
                    for name in "ab":
                        (part / name).write_text(name)
            os._exit(0)
        finally:
            os._exit(1)
print(*(os.waitpid(child, 0)[1] for child in children))
"""


def test_processes_that_replace_one_folder(tmp_path):
    """Processes that do it over and over at the same time: one whole folder is there in the end, and no error."""
    path = tmp_path / "x"
    command = [sys.executable, "-c", REPLACE, str(path)]
    assert subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.split() == ["0"] * 3
    assert os.listdir(tmp_path) == ["x"]
    assert names(path) == ["a", "b"]


HOLD = """
import sys
from pathlib import Path
from turbojax.files import sole_user

with sole_user(Path(sys.argv[1])):
    print("here", flush=True)
    sys.stdin.read()
"""


def test_a_folder_has_one_user(tmp_path):
    """Until it ends, in whatever way."""
    folder = tmp_path / "a" / "b"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "here\n"
        for _ in range(2):
            with pytest.raises(UserError, match="b' is in use by another process; wait until it has ended"):
                sole_user(folder).__enter__()
        other.kill()
    for _ in range(2):
        with sole_user(folder), pytest.raises(UserError, match="is in use"):
            sole_user(folder).__enter__()
        assert names(folder) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file' cannot be made"):
        sole_user(tmp_path / "file").__enter__()
    (tmp_path / "a" / ".lock").mkdir()
    with pytest.raises(UserError, match="lock' cannot be written"):
        sole_user(tmp_path / "a").__enter__()


TAKE = """
import os, sys
from pathlib import Path
from turbojax.errors import UserError
from turbojax.files import sole_user

folder = Path(sys.argv[1])
children = []
for _ in range(3):
    children.append(os.fork())
    if not children[-1]:
        try:
            taken = 0
            while taken < 25:
                try:
                    with sole_user(folder):
                        os.mkdir(folder / "mine")
                        os.rmdir(folder / "mine")
                        taken += 1
                except UserError as error:
                    assert "in use" in str(error), error
            os._exit(0)
        finally:
            os._exit(1)
print(*(os.waitpid(child, 0)[1] for child in children))
"""


def test_processes_that_want_one_folder(tmp_path):
    """Never two of them have it."""
    command = [sys.executable, "-c", TAKE, str(tmp_path / "x")]
    assert subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.split() == ["0"] * 3
