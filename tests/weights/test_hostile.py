"""Checkpoint files that are damaged on purpose or by chance: refused in a sentence, at once, without memory."""

import os
import pickle
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from tests.weights.test_io import archive, assert_same, pickled, pickled_dict, pickled_global, pickled_tensor, refused
from turbojax.errors import CheckpointError
from turbojax.weights import pickles, safetensors
from turbojax.weights.io import read_tensors, write_pth, write_safetensors
from turbojax.weights.mapped import check_stored, mapping_of

TENSORS = {"a": np.arange(64, dtype=np.float32), "b": np.arange(64, 128, dtype=np.float32)}


# The zip file around a checkpoint


def as_pytorch_writes(tensors, *, long=False, crc=True):
    """The bytes of a checkpoint as PyTorch's own zip writer lays them out.

    Sizes and sums stand behind an entry, where they were known, not before it; padding aligns the data at 64 bytes, and
    the directory has both ends, for 32 and 64 bits. long: the form of entries that begin behind the first 4 GB.
    """
    storages = {f"archive/data/{i}": value.tobytes() for i, value in enumerate(tensors.values())}
    items = {}
    for i, (name, value) in enumerate(tensors.items()):
        strides = tuple(n // value.itemsize for n in value.strides)
        items[name] = pickled_tensor(key=str(i), numel=value.size, shape=value.shape, strides=strides)
    entries = {"archive/data.pkl": b"\x80\x02" + pickled_dict(**items) + b".", "archive/byteorder": b"little"}
    out, directory = b"", b""
    for name, content in (entries | storages | {"archive/version": b"3\n", "archive/empty": b""}).items():
        offset, size, total = len(out), len(content), zlib.crc32(content) if crc else 0
        flags, sizes = 0x808 if content else 0x800, (total, size, size)
        extra = struct.pack("<HHQ", 1, 8, offset) if long else b""
        padding = -(len(out) + 30 + len(name) + len(extra) + 4) % 64
        local = extra + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        out += struct.pack("<4s5H3L2H", b"PK\x03\x04", 0, flags, 0, 0, 0, 0, 0, 0, len(name), len(local))
        out += name.encode() + local + content
        if content:
            out += struct.pack("<4sLQQ" if long else "<4sLLL", b"PK\x07\x08", *sizes)
        fields = (0, 0, flags, 0, 0, 0, *sizes, len(name), len(extra), 0, 0, 0, 0, 0xFFFFFFFF if long else offset)
        directory += struct.pack("<4s6H3L5H2L", b"PK\x01\x02", *fields) + name.encode() + extra
    count, start, end = len(entries | storages) + 2, len(out), len(out) + len(directory)
    out += directory
    out += struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 0, 0, 0, 0, count, count, len(directory), start)
    out += struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
    return out + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(directory), start, 0)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("crc", [True, False])
def test_files_as_pytorch_writes_them(tmp_path, long, crc):
    path = tmp_path / "x.pth"
    path.write_bytes(as_pytorch_writes(TENSORS, long=long, crc=crc))
    got = read_tensors(path)
    assert_same(got, TENSORS)
    for tensor in got.values():
        assert tensor.ctypes.data % 64 == 0
        check_stored(tensor)


def written(path: Path, made: str) -> Path:
    if made == "by us":
        write_pth(path, TENSORS.items())
    else:
        path.write_bytes(as_pytorch_writes(TENSORS))
    return path


@pytest.mark.parametrize("made", ["by PyTorch", "by us"])
def test_no_wrong_bit_of_a_zip_header_changes_a_value(tmp_path, made):
    """Each bit of everything but the tensors' bytes: refused, or of no consequence."""
    path = written(tmp_path / "x.pth", made)
    whole = path.read_bytes()
    values = [range(at := whole.index(value.tobytes()), at + value.nbytes) for value in TENSORS.values()]
    loaded = 0
    for at in range(len(whole)):
        if any(at in span for span in values):
            continue
        bad = bytearray(whole)
        bad[at] ^= 1 << at % 8
        path.write_bytes(bad)
        try:
            got = read_tensors(path)
        except CheckpointError:
            continue
        assert_same(got, TENSORS)
        loaded += 1
    assert loaded < len(whole) / 2  # times, versions and padding, which nothing depends on


def test_a_shifted_entry_is_refused(tmp_path):
    """The length of the padding before an entry's bytes, one bit of it: all values would be those four bytes on."""
    path = tmp_path / "x.pth"
    write_pth(path, TENSORS.items())
    bad = bytearray(path.read_bytes())
    bad[28] ^= 4
    path.write_bytes(bad)
    assert "'archive/data/0'" in refused(path)


def test_entries_neither_overlap_nor_leave_gaps(tmp_path):
    path = tmp_path / "x.pth"
    whole = as_pytorch_writes(TENSORS)
    for size in (1, 16, 64):  # before the first entry, all offsets as they were, as zipfile allows
        path.write_bytes(bytes(size) + whole)
        refused(path)
    path.write_bytes(whole + b"x")
    refused(path)
    first, second = (
        whole.index(b"archive/data/" + key, whole.rindex(b"PK\x05\x06") - 400) - 46 for key in (b"0", b"1")
    )
    bad = bytearray(whole)
    bad[second + 42 : second + 46] = bad[first + 42 : first + 46]  # two entries of one place
    path.write_bytes(bad)
    refused(path)


@pytest.mark.parametrize("made", ["by PyTorch", "by us"])
def test_checksums_tell_a_wrong_bit(tmp_path, made):
    path = written(tmp_path / "x.pth", made)
    bad = bytearray(path.read_bytes())
    bad[bad.index(TENSORS["b"].tobytes()) + 100] ^= 1
    path.write_bytes(bad)
    got = read_tensors(path)  # reads none of it
    for view in (got["a"], got["a"][3:].reshape(-1, 1).T):
        check_stored(view)
    for view in (got["b"], got["b"][60:]):
        with pytest.raises(CheckpointError, match=r"x\.pth is damaged: its bytes \d+ to \d+ do not have the CRC-32"):
            check_stored(view)
    assert len(mapping_of(got["a"]).checked) == 1


def test_a_wrong_bit_in_the_pickle_is_told_at_once(tmp_path):
    path = archive(tmp_path / "x.pth", pickled_dict(w=pickled_tensor()))
    bad = bytearray(path.read_bytes())
    bad[bad.index(b"FloatStorage")] ^= 1
    path.write_bytes(bad)
    assert "does not have its CRC-32" in refused(path)


# The pickle in it


def quickly_refused(path, *, most=2**25):
    """Refused in a short sentence, and with memory in proportion to the file."""
    tracemalloc.start()
    try:
        message = refused(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(message) < 400 + len(str(path))
    assert peak < 4 * path.stat().st_size + most
    return message


def nested(levels, width):
    """A tuple of a tuple of ..., each level the same object `width` times: width ** levels items, written out."""
    program = pickled("laugh") + b"\x85q\x00"
    for level in range(levels):
        program += b"(" + b"h" + bytes([level]) + (b"h" + bytes([level])) * (width - 1) + b"tq" + bytes([level + 1])
    return program


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(nested(24, 10) + b"h\x18\x93", id="as a name"),
        pytest.param(nested(24, 10) + pickled("x") + b"\x93", id="as a module"),
        pytest.param(b"}" + nested(24, 10) + b"Ns", id="as a key"),
        pytest.param(nested(24, 10) + b"Q", id="as a storage"),
        pytest.param(pickled_global("torch Size") + nested(24, 10) + b"\x85R", id="as a size"),
        pytest.param(nested(24, 10) + b")R", id="as a function"),
        pytest.param(nested(24, 10), id="as the whole"),
        pytest.param(b"}" + pickled("x" * 10**6) + b"Ns", id="a long key"),
        pytest.param(pickled_global("torch " + "x" * 10**6), id="a long name"),
        pytest.param(pickled("x" * 10**6) + pickled("x") + b"\x93", id="a long module"),
    ],
)
def test_what_is_quoted_is_short(tmp_path, program):
    quickly_refused(archive(tmp_path / "x.pth", program))


def test_a_name_that_is_no_text(tmp_path):
    program = pickled((1,)) + pickled((2,)) + b"\x93"
    assert "asks for an object whose name is not text; it is not a plain" in refused(
        archive(tmp_path / "x.pth", program)
    )


def test_keys_of_one_hash(tmp_path):
    """Dictionaries compare each such key with all before it."""
    keys = b"".join(pickled(i * (2**61 - 1)) + b"N" for i in range(20_000))
    quickly_refused(archive(tmp_path / "x.pth", b"}(" + keys + b"u"))


def test_a_name_given_twice(tmp_path):
    twice = b"}(" + (pickled("w") + pickled_tensor()) * 2 + b"u"
    assert "'w' is given twice" in quickly_refused(archive(tmp_path / "x.pth", twice))


@pytest.mark.parametrize("digits", [b"\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6, b"I" + b"9" * 10**6 + b"\n"])
def test_integers_of_a_million_digits(tmp_path, digits):
    quickly_refused(archive(tmp_path / "x.pth", digits))
    quickly_refused(archive(tmp_path / "x.pth", b"}" + digits + b"Ns"))


@pytest.mark.parametrize("sizes", [b"]q\x01(" + b"K\x01" * 100_000 + b"e", b"(" + b"K\x01" * 100_000 + b"tq\x01"])
def test_sizes_are_not_copied_again_and_again(tmp_path, sizes):
    calls = (pickled_global("torch Size") + b"h\x01\x85R0") * 1000  # 0: POP
    quickly_refused(archive(tmp_path / "x.pth", sizes + calls))


@pytest.mark.parametrize("what", [b"}", b"]\x94"])
def test_programs_of_many_objects(tmp_path, what):
    message = quickly_refused(archive(tmp_path / "x.pth", what * (10**6)), most=100 * 2**20)
    assert f"for more than {pickles.MAX_INSTRUCTIONS} instructions" in message


def test_a_long_program(tmp_path):
    path = archive(tmp_path / "x.pth", b"X" + struct.pack("<i", 2**25) + b"x" * 2**25)
    assert "more than any of weights has" in quickly_refused(path)


def test_strides_of_zero_make_nothing_large(tmp_path):
    for shape, strides in (((10**6, 4096), (0, 0)), ((256384, 4096), (0, 1)), ((2**40,), (0,))):
        tensor = pickled_tensor(shape=shape, strides=strides)
        numel = pickled_tensor(numel=6, shape=(4,), strides=(0,))
        path = archive(tmp_path / "x.pth", pickled_dict(small=numel, w=tensor))
        message = quickly_refused(path)
        assert "reaches beyond" in message or "they repeat its values" in message


def test_many_views_of_one_storage(tmp_path):
    """Each is as large as the file; a network of them would be as large as their sum."""
    path, values = tmp_path / "x.pth", np.zeros(2**18, np.float32)
    for count, problem in ((4, None), (100, "they repeat its values")):
        tensor = pickled_tensor(numel=values.size, shape=values.shape, strides=(1,))
        with zipfile.ZipFile(path, "w") as file:
            program = pickled_dict(**{f"w{i}": tensor for i in range(count)})
            file.writestr("x/data.pkl", b"\x80\x02" + program + b".")
            file.writestr("x/data/0", values.tobytes())
        if problem:
            assert problem in quickly_refused(path)
        else:
            assert len(read_tensors(path)) == count


@pytest.mark.parametrize("protocol", [2, 4])
def test_numbers_as_keys_are_read(tmp_path, protocol):
    """The state of an optimizer beside the weights has them."""
    state = pickle.dumps({"state": {0: 1.5, 1: None}, "groups": [(1, 2), {"lr": 1e-3}]}, protocol=protocol)[2:-1]
    if protocol == 4:
        state = state[9:]  # without the frame around it
    items = pickled("optimizer") + state + pickled("model") + pickled_dict(w=pickled_tensor())
    assert list(read_tensors(archive(tmp_path / "x.pth", b"}(" + items + b"u"))) == ["w"]


# Both formats


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_too_many_tensors_and_too_long_names(tmp_path, suffix):
    def write(tensors):
        path = tmp_path / f"x{suffix}"
        if suffix == ".pth":
            items = {name: pickled_tensor() for name in tensors}
            return archive(path, pickled_dict(**items))
        write_safetensors(path, tensors.items(), tensors)
        return path

    one = np.zeros((2, 3), np.float32)
    assert "name of 501 characters" in refused(write({"x" * 501: one}))
    if suffix == ".safetensors":
        assert "holds 20001 tensors" in refused(write({str(i): np.zeros(1, np.int8) for i in range(20_001)}))


def test_a_header_out_of_proportion(tmp_path):
    path = tmp_path / "x.safetensors"
    header = b'{"__metadata__":{"a":"' + b"x" * safetensors.MAX_HEADER + b'"}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert "has a header of" in quickly_refused(path)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.safetensors.index.json"])
def test_pipes_are_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert "not a regular file" in refused(tmp_path / name)
    (tmp_path / "folder" / name).mkdir(parents=True)
    refused(tmp_path / "folder" / name)
