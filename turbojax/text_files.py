"""Reads text that people write, prompts and captions: UTF-8, or UTF-16 that says so, and nothing else."""

import codecs
import os
import re

from turbojax.errors import UserError
from turbojax.json_reader import read_regular

MOST_BYTES = 2**30
LINE_END = re.compile(r"\r\n|\n|\r")  # str.splitlines also ends lines at U+2028 and others, which prompts may have


def read_text(path: str | os.PathLike) -> str:
    """Reads a regular file of text in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Raises UserError for another file, and for bytes that are neither, by their line.
    """
    try:
        content = read_regular(path, suggestion="give a text file in UTF-8", error=UserError, most_bytes=MOST_BYTES)
    except UserError as error:
        raise UserError(f"the text cannot be read: {error}") from error
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if utf16 else "utf-8-sig"
    try:
        text = content.decode(encoding)
        wrong = text.find("\0")  # UTF-16 without a byte order mark, UTF-32, or no text at all
        if wrong < 0:
            return text
        before = text[:wrong]
    except UnicodeDecodeError as error:
        before = content[: error.start].decode(encoding, errors="ignore")
    raise UserError(
        f"the text cannot be read: line {len(split_lines(before))} of {str(path)!r} is neither UTF-8 nor UTF-16 with a "
        "byte order mark; save the file as UTF-8"
    )


def split_lines(text: str) -> list[str]:
    r"""Splits a text into its lines, which end in \n, \r\n or \r and nowhere else."""
    return LINE_END.split(text)


def check_text(name: str, text: str) -> None:
    """Raises UserError for text that was no UTF-8, which Python passes on as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        before = text[max(0, error.start - 20) : error.start]
        raise UserError(f"the {name} is not UTF-8 after {before!r}; write it in UTF-8") from error
