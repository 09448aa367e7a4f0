"""Files of prompts and captions: encodings, ends of lines, and what is neither."""

import codecs
import os

import pytest

from turbojax.errors import UserError
from turbojax.text_files import check_text, read_text, split_lines

TEXT = "a café\u2028at night\r\n猫\x85\x0b\x1c\rthird\n"


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    ],
    ids=["UTF-8", "UTF-8 with BOM", "UTF-16 LE", "UTF-16 BE"],
)
def test_encodings_and_lines(tmp_path, content):
    (tmp_path / "x.txt").write_bytes(content)
    assert read_text(tmp_path / "x.txt") == TEXT
    assert split_lines(TEXT) == ["a café\u2028at night", "猫\x85\x0b\x1c", "third", ""]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("a cat\r\na café\n".encode("latin-1"), 2),
        ("one\rtwo\nthrée".encode("cp1252"), 3),
        ("猫".encode("shift-jis"), 1),
        ("a cat\n".encode("utf-16-le"), 1),
        ("a cat\n".encode("utf-32"), 1),
        (codecs.BOM_UTF16_LE + "a\nb\n".encode("utf-16-le") + b"\x00", 3),
        (codecs.BOM_UTF16_LE + "a\n".encode("utf-16-le") + b"\x00\xd8x\x00", 2),
        (b"a\nb\n\xef\xbb", 3),
        (b"a\n\0", 2),
        (b"a\n\xed\xa0\x80", 2),
    ],
)
def test_other_bytes_name_file_and_line(tmp_path, content, line):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_text(tmp_path / "x.txt")
    wrong = (
        f"the text cannot be read: line {line} of '{tmp_path}/x.txt' is neither UTF-8 nor UTF-16 with a byte order mark"
    )
    assert str(error.value) == f"{wrong}; save the file as UTF-8"


def test_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "pipe", "/dev/zero", "a\0b"):
        with pytest.raises(UserError, match="give a text file in UTF-8"):
            read_text(path)


def test_arguments_that_were_no_utf8():
    check_text("prompt", "café")
    with pytest.raises(UserError, match="the prompt is not UTF-8 after 'a caf'; write it in UTF-8"):
        check_text("prompt", os.fsdecode(b"a caf\xe9"))
