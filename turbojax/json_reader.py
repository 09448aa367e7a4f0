"""Reads JSON that comes from outside: small, strict, and every field of the type and in the range that its schema says.

    SETTINGS = Object({"layers": Integer(1, 1024), "dtype": Enum("float32", "bfloat16")}, optional={"name": String()})
    fields = read_json(path, SETTINGS, suggestion="convert the checkpoint again")

What is read is a regular file of bounded size, in UTF-8, without repeated keys, NaN, Infinity or deep nesting. What it
returns has been checked against the schema, so that no reader behind it has to. Whatever is wrong is one sentence that
names the file, the field, its value and what it must be.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NoReturn, Protocol

import numpy as np

from turbojax.errors import CheckpointError, UserError, quoted

MOST_BYTES = 2**22  # of a file: parsed, a few bytes of JSON can take a hundred
MOST_NESTED = 32
MOST_DIGITS = 100  # of a whole number; longer ones take the square of their length
MOST_CHARACTERS = 2**16  # of a string

# A string with its escapes, or what is left of one that does not end; possessive, so that time stays linear.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)

_NO_NAME = re.compile(r"[\x00-\x1f\x7f\\]")  # of a file: characters that steer, and another system's separator


class Mismatch(ValueError):
    """A value that its schema does not allow; the text goes behind the file's name."""


class Schema(Protocol):
    """The values that a field may have."""

    def check(self, value: Any, field: str) -> Any:
        """Returns the value as Python code uses it; raises Mismatch. field: its name in errors, "" for all of it."""
        ...


def refuse(value: Any, field: str, expected: str) -> NoReturn:
    raise Mismatch(f"{field or 'it'} is {quoted(value)} and must be {expected}")


@dataclasses.dataclass(frozen=True)
class Anything:
    """Any value of JSON, for what is only kept."""

    def check(self, value: Any, field: str) -> Any:
        return value


@dataclasses.dataclass(frozen=True)
class Integer:
    """A whole number, minimum and maximum included."""

    minimum: int
    maximum: int

    def check(self, value: Any, field: str) -> int:
        if type(value) is not int or not self.minimum <= value <= self.maximum:
            refuse(value, field, f"a whole number from {self.minimum} to {self.maximum}")
        return value


@dataclasses.dataclass(frozen=True)
class Number:
    """A finite number, as a float; above: it must be above the minimum."""

    minimum: float
    maximum: float
    above: bool = False

    def check(self, value: Any, field: str) -> float:
        number = type(value) in (int, float) and self.minimum <= value <= self.maximum
        if not number or (self.above and value == self.minimum):
            least = f"above {self.minimum:g} and up to" if self.above else f"from {self.minimum:g} to"
            refuse(value, field, f"a number {least} {self.maximum:g}")
        return float(value)


@dataclasses.dataclass(frozen=True)
class String:
    """Text, of at most so many characters; pattern: a regular expression for all of it, described by `expected`."""

    maximum: int = MOST_CHARACTERS
    pattern: str = r"(?s).*"
    expected: str = "text"

    def check(self, value: Any, field: str) -> str:
        if type(value) is not str or len(value) > self.maximum or not re.fullmatch(self.pattern, value):
            refuse(value, field, f"{self.expected} of at most {self.maximum} characters")
        return value


@dataclasses.dataclass(frozen=True)
class FileName:
    """A file beside the one that names it; folders: or in folders beside it."""

    folders: bool = False

    def check(self, value: Any, field: str) -> str:
        parts = value.split("/") if type(value) is str and len(value) < 1024 else [".."]
        if {"", ".", ".."} & set(parts) or _NO_NAME.search(value) or (len(parts) > 1 and not self.folders):
            refuse(value, field, "a path below the file's own folder" if self.folders else "a file's name, no path")
        return value


@dataclasses.dataclass(frozen=True)
class Boolean:
    """true or false."""

    def check(self, value: Any, field: str) -> bool:
        if type(value) is not bool:
            refuse(value, field, "true or false")
        return value


@dataclasses.dataclass(frozen=True, init=False)
class Enum:
    """One of the values, of their very types: true is not 1."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any):
        object.__setattr__(self, "values", values)

    def check(self, value: Any, field: str) -> Any:
        if not any(type(value) is type(allowed) and value == allowed for allowed in self.values):
            refuse(value, field, " or ".join(json.dumps(allowed) for allowed in self.values))
        return value


@dataclasses.dataclass(frozen=True)
class Nullable:
    """null, as None, or what `schema` allows."""

    schema: Schema

    def check(self, value: Any, field: str) -> Any:
        return None if value is None else self.schema.check(value, field)


@dataclasses.dataclass(frozen=True)
class Array:
    """A list, as a tuple, of minimum to maximum items."""

    items: Schema
    minimum: int = 0
    maximum: int = 2**20

    def check(self, value: Any, field: str) -> tuple[Any, ...]:
        if type(value) is not list or not self.minimum <= len(value) <= self.maximum:
            counts = f"{self.minimum}" if self.minimum == self.maximum else f"{self.minimum} to {self.maximum}"
            refuse(value, field, f"a list of {counts} items")
        return tuple(self.items.check(item, f"{field}[{i}]") for i, item in enumerate(value))


@dataclasses.dataclass(frozen=True)
class Object:
    """Fields by their names. others: the schema of all fields that are neither required nor optional."""

    required: Mapping[str, Schema]
    optional: Mapping[str, Schema] = dataclasses.field(default_factory=dict)
    others: Literal["refused", "left out"] | Schema = "refused"

    def check(self, value: Any, field: str) -> dict[str, Any]:
        if type(value) is not dict:
            refuse(value, field, "an object of fields, {...}")
        schemas = {**self.required, **self.optional}
        if missing := [name for name in self.required if name not in value]:
            raise Mismatch(f"{within(field, missing[0])} is missing")
        if self.others == "refused" and (unknown := [name for name in value if name not in schemas]):
            raise Mismatch(f"{field or 'it'} has the unknown field {quoted(unknown[0])}")
        if not isinstance(self.others, str):
            schemas = dict.fromkeys(value, self.others) | schemas
        return {name: schemas[name].check(own, within(field, name)) for name, own in value.items() if name in schemas}


@dataclasses.dataclass(frozen=True)
class Map:
    """Values of one kind by names that the file chooses."""

    values: Schema
    names: Schema = String(1024)

    def check(self, value: Any, field: str) -> dict[str, Any]:
        if type(value) is not dict:
            refuse(value, field, "an object of names, {...}")
        for name in value:
            self.names.check(name, f"a name of {field}" if field else "a name")
        return {name: self.values.check(own, f"{field}[{quoted(name)}]") for name, own in value.items()}


@dataclasses.dataclass(frozen=True, init=False)
class AnyOf:
    """A value that one of the schemas allows; expected: all of them in words, for the error."""

    expected: str
    schemas: tuple[Schema, ...]

    def __init__(self, expected: str, *schemas: Schema):
        object.__setattr__(self, "expected", expected)
        object.__setattr__(self, "schemas", schemas)

    def check(self, value: Any, field: str) -> Any:
        for schema in self.schemas:
            try:
                return schema.check(value, field)
            except Mismatch:
                continue
        refuse(value, field, self.expected)


@dataclasses.dataclass(frozen=True)
class InString:
    """A value as JSON in a string, as the headers of safetensors files hold them."""

    schema: Schema

    def check(self, value: Any, field: str) -> Any:
        if type(value) is str:
            with contextlib.suppress(ValueError):  # the schema says what belongs there
                value = load(value.encode())
        return self.schema.check(value, field)


def within(field: str, name: str) -> str:
    return f"{field}.{name}" if field else name


def read_json(
    path: str | os.PathLike,
    schema: Schema,
    *,
    suggestion: str,
    error: type[UserError] = CheckpointError,
    most_bytes: int = MOST_BYTES,
) -> Any:
    """Reads a file of JSON, checked against its schema.

    suggestion: ends the sentence of an error, such as "download it again". error: its class.

    Raises that error where the file is not there, not a regular file (pipes and devices are not waited for), larger
    than most_bytes, no JSON, or has a field that the schema does not allow.
    """
    content = read_regular(path, suggestion=suggestion, error=error, most_bytes=most_bytes)
    return parse_json(content, schema, name=str(path), suggestion=suggestion, error=error, most_bytes=most_bytes)


def read_json_lines(
    path: str | os.PathLike,
    schema: Schema,
    *,
    suggestion: str,
    error: type[UserError] = UserError,
    most_bytes: int = 2**26,
) -> Iterator[Any]:
    """Reads each line of a file, as `read_json` does; empty lines are left out, errors name the line."""
    content = read_regular(path, suggestion=suggestion, error=error, most_bytes=most_bytes)
    for number, line in enumerate(re.split(rb"\r\n|\n|\r", content.removeprefix(b"\xef\xbb\xbf")), start=1):
        if line.strip():
            yield parse_json(line, schema, name=f"{path}, line {number}", suggestion=suggestion, error=error)


def read_regular(path: str | os.PathLike, *, suggestion: str, error: type[UserError], most_bytes: int) -> bytes:
    """Reads a regular file that holds at most most_bytes; raises `error`, see `read_json`."""
    try:
        with open(path, "rb", opener=without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise error(f"{path} is not a regular file; {suggestion}")
            content = file.read(most_bytes + 1)
    except FileNotFoundError as problem:
        raise error(f"{path} does not exist; {suggestion}") from problem
    except (OSError, ValueError) as problem:  # ValueError: a zero byte in the path
        if isinstance(problem, UserError):
            raise
        raise error(
            f"{path} cannot be read: {getattr(problem, 'strerror', None) or problem}; {suggestion}"
        ) from problem
    if len(content) > most_bytes:
        raise error(f"{path} holds more than {most_bytes} bytes; {suggestion}")
    return content


def without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for its writer


def parse_json(
    content: bytes,
    schema: Schema,
    *,
    name: str,
    suggestion: str,
    error: type[UserError] = CheckpointError,
    most_bytes: int = MOST_BYTES,
) -> Any:
    """Does as `read_json` with bytes that were read, UTF-8 with or without a byte order mark. name: of the file."""
    try:
        return schema.check(load(content, most_bytes), "")
    except Mismatch as problem:
        raise error(f"{name}: {problem}; {suggestion}") from problem
    except UnicodeError as problem:
        raise error(f"{name} is not text in UTF-8; {suggestion}") from problem
    except ValueError as problem:
        start = quoted(content[:40].decode(errors="replace"))
        raise error(f"{name} is no JSON, {start}: {problem}; {suggestion}") from problem


def check_value(
    value: Any, schema: Schema, *, name: str, suggestion: str, error: type[UserError] = CheckpointError
) -> Any:
    """Does as `read_json` with a value that something else has parsed, such as the header of a safetensors file."""
    try:
        return schema.check(value, "")
    except Mismatch as problem:
        raise error(f"{name}: {problem}; {suggestion}") from problem


def load(content: bytes, most_bytes: int = MOST_BYTES) -> Any:
    """Parses JSON without a schema yet; raises ValueError, of which Mismatch is one."""
    if len(content) > most_bytes:
        raise Mismatch(f"it holds more than {most_bytes} bytes")
    check_nesting(content)
    value = json.loads(
        content.decode("utf-8-sig"),
        object_pairs_hook=unique,
        parse_int=parse_integer,
        parse_float=parse_number,
        parse_constant=parse_number,
    )
    if b"\\u" in content:
        json.dumps(value, ensure_ascii=False).encode()  # half a character, \ud800, can be neither shown nor written
    return value


def check_nesting(content: bytes) -> None:
    """Raises Mismatch where brackets are open within brackets too often for the parser's stack."""
    code = np.frombuffer(_STRING.sub(b"", content), np.uint8)
    brackets = code[np.isin(code, np.frombuffer(b"[{]}", np.uint8))]
    steps = np.where(np.isin(brackets, np.frombuffer(b"[{", np.uint8)), np.int8(1), np.int8(-1))
    depth = np.cumsum(steps, dtype=np.int32)
    if (deepest := int(np.max(depth, initial=0))) > MOST_NESTED:
        raise Mismatch(f"it is nested {deepest} deep and may be {MOST_NESTED}")


def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise Mismatch(f"{quoted(name)} is given twice")
        fields[name] = value
    return fields


def parse_integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise Mismatch(f"the whole number {text[:20]}... has {len(text)} digits and may have {MOST_DIGITS}")
    return int(text)


def parse_number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Mismatch(f"the number {text[:20]} is not finite")
    return value
