"""Records of finished work: read as they were written, and no damaged line taken for one."""

import json
import os

import pytest

from turbojax.app.records import Records
from turbojax.errors import UserError
from turbojax.json_reader import Map, Number

RECORD = {"key": "0123456789abcdef", "files": ["video.mp4", "frames/0.png"], "prompt": "a cat", "more": {"a": [1]}}


@pytest.fixture
def path(tmp_path):
    (tmp_path / "frames").mkdir()
    for name in RECORD["files"]:
        (tmp_path / name).write_text(name)
    Records(tmp_path / "video.jsonl").add(RECORD)
    return tmp_path / "video.jsonl"


def test_a_record_is_kept_whole(path):
    records = Records(path)
    assert records.get("x") is None
    found = records.get(RECORD["key"])
    assert {**found, "files": list(found["files"])} == RECORD | {"sha256": found["sha256"]}
    records.add(RECORD | {"key": "other"})
    assert [json.loads(line)["more"] for line in path.read_text().splitlines()] == [{"a": [1]}] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ("[1]", r"line 2: it is \[1\] and must be an object"),
        ("{}", "line 2: key is missing"),
        ({"key": 1}, "key is 1 and must be text"),
        ({"key": ["a"]}, r"key is \['a'\]"),
        ({"files": "video.mp4"}, "files is 'video.mp4' and must be a list"),
        ({"files": []}, r"files is \[\]"),
        ({"files": [3]}, r"files\[0\] is 3 and must be a path below"),
        ({"files": ["../../../etc/passwd"]}, r"files\[0\] is '\.\./"),
        ({"files": ["/etc/passwd"]}, r"files\[0\] is '/etc/passwd'"),
        ({"files": ["a\0b"]}, r"files\[0\] is 'a\\x00b'"),
        ({"sha256": {}}, "sha256 is {}"),
        ({"seconds": {"vae": None}}, r"seconds\['vae'\] is None"),
        ("[" * 100_000, "nested 100000 deep"),
        ('{"key": "a", "key": "b"}', "'key' is given twice"),
    ],
)
def test_damaged_lines(path, line, message):
    content = line if isinstance(line, str) else json.dumps({"seconds": {}} | RECORD | line)
    path.write_text(json.dumps(RECORD | {"seconds": {}}) + "\n" + content + "\n")
    with pytest.raises(UserError, match=message) as error:
        Records(path, {"seconds": Map(Number(0, 1e9))})
    assert str(error.value).startswith(f"{path}, line 2")
    assert "move it away, or name another output" in str(error.value)


def test_a_pipe_is_no_record(tmp_path):
    os.mkfifo(tmp_path / "video.jsonl")
    with pytest.raises(UserError, match="is not a regular file"):
        Records(tmp_path / "video.jsonl")
