"""JSON from outside: what is read, and the one sentence for what is not."""

import json
import os
import tracemalloc

import pytest

from turbojax.errors import CheckpointError, UserError, quoted
from turbojax.json_reader import (
    AnyOf,
    Array,
    Boolean,
    Enum,
    FileName,
    InString,
    Integer,
    Map,
    Nullable,
    Number,
    Object,
    String,
    check_value,
    parse_json,
    read_json,
    read_json_lines,
)

SCHEMA = Object(
    {"layers": Integer(1, 1024), "share": Number(0, 1, above=True), "dtype": Enum("float32", "bfloat16")},
    optional={
        "patch": Array(Integer(1, 16), 3, 3),
        "width": Nullable(Integer(1, 10)),
        "on": Boolean(),
        "shards": Map(FileName()),
        "video": FileName(folders=True),
        "nested": Object({"name": String(8)}),
        "any": AnyOf("text or a switch", String(), Boolean()),
    },
)
GOOD = {"layers": 2, "share": 1, "dtype": "float32"}


def parse(content):
    return parse_json(content, SCHEMA, name="model.json", suggestion="download it again")


def refused(content, *words, schema=SCHEMA):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(CheckpointError) as caught:
        parse_json(content, schema, name="model.json", suggestion="download it again")
    text = str(caught.value)
    assert text.startswith("model.json")
    assert text.endswith("; download it again")
    assert "\n" not in text
    assert len(text) < 400
    for word in words:
        assert word in text, text


def test_values():
    more = {"patch": [1, 2, 2], "width": None, "on": True, "shards": {"a": "1.safetensors"}, "video": "videos/1.mp4"}
    found = parse(json.dumps({**GOOD, **more, "nested": {"name": "é"}, "any": False}).encode())
    assert found == GOOD | more | {"patch": (1, 2, 2), "nested": {"name": "é"}, "any": False}
    assert isinstance(found["share"], float)
    assert parse(b"\xef\xbb\xbf" + json.dumps(GOOD).encode()) == GOOD


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": 10**30}, ["layers is 1000", "must be a whole number from 1 to 1024"]),
        ({"layers": 0}, ["layers is 0"]),
        ({"layers": True}, ["layers is True"]),
        ({"layers": 2.0}, ["layers is 2.0"]),
        ({"layers": "2"}, ["layers is '2'"]),
        ({"layers": None}, ["layers is None"]),
        ({"share": 0}, ["share is 0 and must be a number above 0 and up to 1"]),
        ({"share": True}, ["share is True"]),
        ({"share": "0.5"}, ["share is '0.5'"]),
        ({"share": None}, ["share is None"]),
        ({"share": [0.5]}, ["share is [0.5]"]),
        ({"share": 10**90}, ["share is 1000"]),
        ({"dtype": "int8"}, ["dtype is 'int8' and must be", '"float32" or "bfloat16"']),
        ({"dtype": ["float32"]}, ["dtype is ['float32']"]),
        ({"dtype": "f" * 10**5}, ["dtype is 'fff", "..."]),
        ({"patch": [1, 2]}, ["patch is [1, 2] and must be a list of 3 items"]),
        ({"patch": [1, 2, 17]}, ["patch[2] is 17"]),
        ({"patch": {"0": 1}}, ["patch is {'0': 1}"]),
        ({"width": 11}, ["width is 11"]),
        ({"on": 1}, ["on is 1 and must be true or false"]),
        ({"shards": {"a": "../a"}}, ["shards['a'] is '../a'", "no path"]),
        ({"shards": {"a": "/etc/passwd"}}, ["shards['a']"]),
        ({"shards": {"a": "..\\a"}}, ["shards['a']"]),
        ({"shards": {"a": ""}}, ["shards['a']"]),
        ({"shards": {"a": "a\0b"}}, ["shards['a']"]),
        ({"shards": ["a"]}, ["shards is ['a']"]),
        ({"shards": {"a" * 2000: "b"}}, ["a name of shards is 'aaa"]),
        ({"video": "videos/../../x"}, ["video is 'videos/../../x' and must be a path below"]),
        ({"video": "/x"}, ["video is '/x'"]),
        ({"nested": {"name": "123456789"}}, ["nested.name is '123456789'", "at most 8 characters"]),
        ({"nested": {}}, ["nested.name is missing"]),
        ({"any": 1}, ["any is 1 and must be text or a switch"]),
        ({"other": 1}, ["unknown field 'other'"]),
    ],
)
def test_fields_of_another_kind(change, words):
    refused(GOOD | change, *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["no JSON"]),
        (b"<!doctype html>", ["no JSON", "<!doctype html>"]),
        (b"[1, 2]", ["it is [1, 2]"]),
        (b'{"layers": 1, "layers": 1}', ["'layers' is given twice"]),
        (b'{"share": NaN}', ["NaN"]),
        (b'{"share": -Infinity}', ["-Infinity"]),
        (b'{"share": 1e999}', ["1e999"]),
        (b'{"layers": ' + b"9" * 10**6 + b"}", ["1000000 digits"]),
        (b"[" * 100_000, ["nested 100000 deep"]),
        (b'{"a":' * 100_000, ["nested 100000 deep"]),
        (b'{"dtype": "\\ud800"}', ["UTF-8"]),
        ('{"dtype": "é"}'.encode("latin-1"), ["UTF-8"]),
        (json.dumps(GOOD).encode("utf-16"), ["UTF-8"]),
        (b'"' + b'\\"' * 10**6, ["no JSON"]),
        (b" " * 2**22 + b"{}", ["more than 4194304 bytes"]),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_is_no_json(content, words):
    refused(content, *words)


VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    1.5,
    10**40,
    "",
    "1",
    "x" * 10**5,
    [],
    [1],
    [[1]],
    {},
    {"a": 1},
    {"a": {"b": []}},
)


@pytest.mark.parametrize("schema", [*(SCHEMA.required | SCHEMA.optional).values(), SCHEMA, InString(Integer(1, 2))])
def test_any_value_is_taken_or_refused(schema):
    """Each schema sees each kind of value; whatever is not taken is one sentence."""
    refusals = 0
    for value in VALUES:
        content = json.dumps(value).encode()
        try:
            parse_json(content, schema, name="model.json", suggestion="download it again")
        except CheckpointError:
            refusals += 1
            refused(content, schema=schema)
    assert refusals > 0


def test_values_in_strings():
    schema = Object(
        {}, {"heads": InString(Integer(1, 64)), "share": InString(Nullable(Number(0, 1)))}, others="left out"
    )

    def check(value):
        return check_value(value, schema, name="x.safetensors, in its header", suggestion="convert it again")

    assert check({"heads": "12", "share": "0.5", "other": "?"}) == {"heads": 12, "share": 0.5}
    for value in ({"heads": "twelve"}, {"heads": "65"}, {"heads": "1e999"}, {"share": "nan"}, {"share": "NaN"}, []):
        with pytest.raises(
            CheckpointError, match=r"x\.safetensors, in its header: .* and must be .*; convert it again"
        ):
            check(value)


def test_brackets_in_strings_do_not_nest():
    schema = Object({"text": String()})
    text = '["' + "[" * 1000 + '\\"'
    assert parse_json(json.dumps({"text": text}).encode(), schema, name="x", suggestion="") == {"text": text}


def test_the_worst_file_takes_little_memory():
    worst = b"[" + b"[]," * (2**22 // 3 - 1) + b"[]]"
    tracemalloc.start()
    refused(worst, "it is [[], [], [], [], ...]")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(worst) + 100e6


def test_files(tmp_path):
    def read(path, **options):
        return read_json(path, SCHEMA, suggestion="convert it again", **options)

    path = tmp_path / "model.json"
    with pytest.raises(CheckpointError, match=r"model.json does not exist; convert it again"):
        read(path)
    path.write_text(json.dumps(GOOD))
    assert read(path) == GOOD
    (tmp_path / "link.json").symlink_to(path)
    assert read(tmp_path / "link.json") == GOOD
    with pytest.raises(UserError, match="holds more than 10 bytes"):
        read(path, most_bytes=10, error=UserError)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match=r"model.json: layers is missing; convert it again"):
        read(path)


def test_only_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", tmp_path, "/dev/zero", "/dev/null"):
        with pytest.raises(CheckpointError, match=r"is not a regular file; move it away|Is a directory"):
            read_json(path, SCHEMA, suggestion="move it away")
    with pytest.raises(CheckpointError, match="embedded null"):
        read_json("a\0b", SCHEMA, suggestion="move it away")


def test_lines(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"n": 1}\r\n\n{"n": 2}')
    schema = Object({"n": Integer(1, 2)})
    assert list(read_json_lines(path, schema, suggestion="")) == [{"n": 1}, {"n": 2}]
    path.write_text('{"n": 1}\n{"n": 3}\n')
    with pytest.raises(UserError, match=r"records.jsonl, line 2: n is 3"):
        list(read_json_lines(path, schema, suggestion="move it away"))


def test_quoted_values_are_short():
    for value in ("x" * 10**6, ["x" * 10**6] * 10**4, {"x" * 10**6: {"y": 1}}, 10**99, ["\n\ud800"], {1: {2: {3: 4}}}):
        text = quoted(value)
        assert len(text) <= 68
        assert text.isprintable()
    assert quoted("a'b") == '"a\'b"'
    assert quoted(10**6) == "1000000"
