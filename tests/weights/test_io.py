"""Checkpoint files: what is written is read back, and every bad file gives one clear sentence."""

import json
import os
import pickle
import struct
import zipfile

import jax
import numpy as np
import pytest
from safetensors import deserialize, safe_open
from safetensors.numpy import save_file

from turbojax.errors import CheckpointError, UserError
from turbojax.weights import pickles, pth, safetensors
from turbojax.weights.io import read_tensors, write_pth, write_safetensors


def example_tensors():
    values = np.random.default_rng(0).normal(size=(3, 5)) * 3
    tensors = {name: np.abs(values).astype(dtype) for name, dtype in pickles.DTYPES.items()}
    return tensors | {
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.int8),
        "transposed": values.astype(np.float32).T,
        "one": np.ones(1, np.float32)[::-1],  # numpy gives it a negative stride
        "blocks.0.norm é": np.arange(120, dtype=np.int16).reshape(2, 3, 4, 5),
    }


def write(path, tensors):
    if path.suffix == ".pth":
        write_pth(path, tensors.items())
    else:
        write_safetensors(path, tensors.items(), tensors)
    return path


def assert_same(got, wanted):
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype
        assert got[name].shape == value.shape
        assert got[name].tobytes() == value.tobytes()


def refused(path):
    """The message of the CheckpointError that reading gives; one line, naming the file."""
    with pytest.raises(CheckpointError) as caught:
        read_tensors(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# Writing and reading back


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_round_trip_in_every_dtype(tmp_path, suffix):
    tensors = example_tensors()
    assert_same(read_tensors(write(tmp_path / f"x{suffix}", tensors)), tensors)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_tensors_are_read_only_views_of_the_file(tmp_path, suffix):
    got = read_tensors(str(write(tmp_path / f"x{suffix}", example_tensors())))
    for array in got.values():
        assert isinstance(array.base, np.memmap)
        assert not array.flags.writeable


def test_pth_data_is_aligned(tmp_path):
    got = read_tensors(write(tmp_path / "x.pth", example_tensors()))
    assert {array.ctypes.data % 64 for array in got.values() if array.size} == {0}


def test_written_safetensors_are_read_by_the_library(tmp_path):
    tensors = {k: v for k, v in example_tensors().items() if not k.startswith(("bfloat", "float8"))}
    path = tmp_path / "x.safetensors"
    write_safetensors(path, tensors.items(), tensors, metadata={"format": "pt"})
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert_same({name: file.get_tensor(name) for name in tensors}, tensors)


def test_the_library_reads_every_dtype(tmp_path):
    tensors = example_tensors()
    read = dict(deserialize(write(tmp_path / "x.safetensors", tensors).read_bytes()))
    assert {name: entry["dtype"] for name, entry in read.items()} == {
        name: next(code for code, dtype in safetensors.DTYPES.items() if dtype == value.dtype)
        for name, value in tensors.items()
    }
    assert {name: bytes(entry["data"]) for name, entry in read.items()} == {
        name: value.tobytes() for name, value in tensors.items()
    }


def test_safetensors_of_the_library_are_read(tmp_path):
    tensors = {"a": np.arange(5, dtype=np.float32), "b": np.array([[True, False]])}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"k": "v"})
    got = read_tensors(tmp_path / "x.safetensors")
    assert_same({name: got[name] for name in tensors}, tensors)


def test_safetensors_header_is_padded(tmp_path):
    data = write(tmp_path / "x.safetensors", example_tensors()).read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0


def test_jax_arrays_and_specs(tmp_path):
    array = jax.numpy.ones((2, 3), jax.numpy.bfloat16)
    spec = jax.ShapeDtypeStruct(array.shape, array.dtype)
    write_safetensors(tmp_path / "x.safetensors", [("a", array)], {"a": spec})
    write_pth(tmp_path / "x.pth", [("a", array)])
    for suffix in (".safetensors", ".pth"):
        assert_same(read_tensors(tmp_path / f"x{suffix}"), {"a": np.asarray(array)})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("b", np.zeros(2)), ("a", np.zeros(2))], "'b' came where specs has 'a'"),
        ([("a", np.zeros(3)), ("b", np.zeros(2))], r"'a' is float64\(3,\), specs has float64\(2,\)"),
        ([("a", np.zeros(2, np.int8))], "'a' is int8"),
        ([("a", np.zeros(2))], "1 tensors of specs did not come, first 'b'"),
        ([("a", np.zeros(2)), ("b", np.zeros(2)), ("c", np.zeros(2))], "'c' came where specs has None"),
    ],
)
def test_safetensors_must_match_specs(tmp_path, tensors, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(CheckpointError, match=message):
        write_safetensors(path, tensors, {"a": np.zeros(2), "b": np.zeros(2)})
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert path.read_bytes() == b"before"


def test_failing_iterator_leaves_nothing(tmp_path):
    def tensors():
        yield "a", np.zeros(2)
        raise RuntimeError("converter failed")

    with pytest.raises(RuntimeError, match="converter failed"):
        write_pth(tmp_path / "x.pth", tensors())
    with pytest.raises(RuntimeError, match="converter failed"):
        write_safetensors(tmp_path / "x.safetensors", tensors(), {"a": np.zeros(2), "b": np.zeros(2)})
    assert os.listdir(tmp_path) == []


def test_unwritable(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file' cannot be made: File exists"):
        write_pth(tmp_path / "file" / "x.pth", [])
    complex_ = {"a": np.zeros(2, np.complex64)}
    with pytest.raises(CheckpointError, match="complex64"):
        write(tmp_path / "x.pth", complex_)
    with pytest.raises(CheckpointError, match="complex64"):
        write(tmp_path / "x.safetensors", complex_)
    with pytest.raises(CheckpointError, match="'a' is given twice"):
        write_pth(tmp_path / "x.pth", [("a", np.zeros(2)), ("a", np.zeros(2))])


# Folders and shards


def sharded(folder, shard_of):
    for shard in set(shard_of.values()):
        names = [name for name, home in shard_of.items() if home == shard]
        write(folder / shard, {name: np.full(2, int(name), np.float32) for name in names})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": shard_of}))
    return index


def test_sharded(tmp_path):
    index = sharded(tmp_path, {"0": "a.safetensors", "2": "b.safetensors", "1": "a.safetensors"})
    for path in (index, tmp_path):
        assert {name: value[0] for name, value in read_tensors(path).items()} == {"0": 0, "1": 1, "2": 2}


def test_bad_shards(tmp_path):
    index = sharded(tmp_path, {"0": "a.safetensors", "1": "b.safetensors", "2": "b.safetensors"})
    write(tmp_path / "b.safetensors", {"1": np.zeros(2)})
    assert "b.safetensors lacks '2'" in refused(index)
    write(tmp_path / "b.safetensors", {"0": np.zeros(2), "1": np.zeros(2), "2": np.zeros(2)})
    assert "b.safetensors repeats '0'" in refused(index)
    (tmp_path / "b.safetensors").write_bytes(b"")
    assert "empty" in refused(tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").unlink()
    assert "needs 'b.safetensors', not found" in refused(index)
    index.write_text('{"weight_map": {"0": "../a.safetensors"}}')
    assert "'../a.safetensors' and must be a file's name" in refused(index)
    for text in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1, "b": "x"}}', "[" * 100_000):
        index.write_text(text)
        refused(index)
    index.write_text('{"weight_map": {"a": "x", "a": "y"}}')
    assert "'a' is given twice" in refused(index)


def test_folder(tmp_path):
    assert "found nothing" in refused(tmp_path)
    write(tmp_path / "x.pth", {"a": np.zeros(2)})
    assert "found x.pth" in refused(tmp_path)
    write(tmp_path / "x.safetensors", {"a": np.zeros(2)})
    assert list(read_tensors(tmp_path)) == ["a"]
    write(tmp_path / "y.safetensors", {"a": np.zeros(2)})
    assert "found x.safetensors, y.safetensors" in refused(tmp_path)


# Bad files


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.bin", "x.safetensors", "x.safetensors.index.json"])
def test_bad_files(tmp_path, name):
    path = tmp_path / name
    assert "does not exist" in refused(path)
    path.write_bytes(b"")
    assert "is empty" in refused(path)
    path.write_bytes(b"\n<!DOCTYPE html><html>Access denied</html>")
    assert "looks like an HTML page" in refused(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "git-lfs pointer" in refused(path)
    for content in (b"\0", b"PK\x03\x04", b"\xff" * 1000, b"cos\nsystem\n", bytes(range(256))):
        path.write_bytes(content)
        refused(path)


def test_unknown_extension(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert "unknown extension '.gguf'" in refused(tmp_path / "x.gguf")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind this user")
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_no_permission(tmp_path, suffix):
    path = write(tmp_path / f"x{suffix}", {"a": np.zeros(2)})
    path.chmod(0)
    assert "may not be read" in refused(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_cut_off_anywhere(tmp_path, suffix):
    data = write(tmp_path / f"x{suffix}", {"a": np.arange(8.0), "b": np.ones((2, 2), np.int8)}).read_bytes()
    path = tmp_path / f"cut{suffix}"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        refused(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_damage_never_raises_anything_else(tmp_path, suffix):
    data = write(tmp_path / f"x{suffix}", {"a": np.arange(8.0), "b": np.ones((2, 2), np.int8)}).read_bytes()
    path = tmp_path / f"bad{suffix}"
    rng = np.random.default_rng(0)
    for _ in range(1000):
        bad = np.frombuffer(data, np.uint8).copy()
        bad[rng.integers(len(bad), size=rng.integers(1, 4))] = rng.integers(256)
        path.write_bytes(bad.tobytes())
        try:
            for array in read_tensors(path).values():
                array.tobytes()
        except CheckpointError:
            pass


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,16]}}', "damaged"),
        ('{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}', "damaged"),
        ('{"a":{"dtype":"C64","shape":[2],"data_offsets":[0,16]}}', "'a' has dtype C64"),
        ('{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}', "damaged"),
        ('{"a":{"dtype":"U8","shape":[16],"data_offsets":[0,16]},"a":1}', "damaged"),
        ("not json", "damaged"),
        ("[]", "damaged"),
    ],
)
def test_bad_safetensors_header(tmp_path, header, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(16))
    assert message in refused(path)
    path.write_bytes(struct.pack("<Q", 2**63) + header.encode())
    refused(path)


# PyTorch pickles, written by hand


def pickled_tensor(
    *, storage="torch FloatStorage", key="0", numel=6, offset=0, shape=(2, 3), strides=(3, 1), parameter=False
):
    reference = b"".join([pickled("storage"), pickled_global(storage), *map(pickled, (key, "cpu", numel))])
    args = b"(" + reference + b"tQ" + pickled(offset) + pickled(shape) + pickled(strides) + b"\x89"
    args += pickled_global("collections OrderedDict") + b")R"
    tensor = pickled_global("torch._utils _rebuild_tensor_v2") + b"(" + args + b"tR"
    if not parameter:
        return tensor
    return pickled_global("torch._utils _rebuild_parameter") + b"(" + tensor + b"\x88)tR"


def pickled(value):
    return pickle.dumps(value, protocol=2)[2:-1]


def pickled_global(name):
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def pickled_dict(**items):
    return b"}(" + b"".join(pickled(name) + value for name, value in items.items()) + b"u"


def archive(path, program, *, byteorder="little", compression=zipfile.ZIP_STORED):
    """A checkpoint with one storage "0" of the float32 numbers 0 to 5."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("x/data.pkl", b"\x80\x02" + program + b".")
        file.writestr("x/byteorder", byteorder)
        file.writestr("x/data/0", np.arange(6, dtype=np.float32).tobytes())
    return path


def test_views_share_one_storage(tmp_path):
    program = pickled_dict(
        whole=pickled_tensor(),
        transposed=pickled_tensor(shape=(3, 2), strides=(1, 3)),
        row=pickled_tensor(offset=3, shape=(3,), strides=(1,)),
        repeated=pickled_tensor(offset=5, shape=(4,), strides=(0,)),
        parameter=pickled_tensor(parameter=True),
        scalar=pickled_tensor(offset=4, shape=(), strides=()),
        empty=pickled_tensor(offset=6, shape=(0, 3), strides=(3, 1)),
    )
    got = read_tensors(archive(tmp_path / "x.pth", program))
    whole = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(got["whole"], whole)
    np.testing.assert_array_equal(got["transposed"], whole.T)
    np.testing.assert_array_equal(got["row"], whole[1])
    np.testing.assert_array_equal(got["repeated"], [5, 5, 5, 5])
    np.testing.assert_array_equal(got["parameter"], whole)
    assert got["scalar"] == 4
    assert got["empty"].shape == (0, 3)


def test_state_dict_with_metadata_attribute(tmp_path):
    state = pickled_global("collections OrderedDict") + b")R" + b"(" + pickled("w") + pickled_tensor() + b"u"
    program = state + b"}" + pickled("_metadata") + pickled_dict() + b"sb"
    assert list(read_tensors(archive(tmp_path / "x.pth", program))) == ["w"]


@pytest.mark.parametrize("key", pth.WRAPPERS)
def test_wrapped_state_dict(tmp_path, key):
    program = pickled_dict(**{key: pickled_dict(w=pickled_tensor(), version=pickled(3))}, epoch=pickled(7))
    assert list(read_tensors(archive(tmp_path / "x.pth", program))) == ["w"]


def test_other_entries_are_ignored(tmp_path):
    program = pickled_dict(w=pickled_tensor(), step=pickled(2**40), note=pickled("x"), none=pickled(None))
    assert list(read_tensors(archive(tmp_path / "x.pth", program))) == ["w"]


def test_several_sets_of_weights(tmp_path):
    weights = pickled_dict(w=pickled_tensor())
    program = pickled_dict(model=weights, ema=weights, optimizer=weights)
    assert "several sets of weights (model, ema)" in refused(archive(tmp_path / "x.pth", program))


@pytest.mark.parametrize("program", [pickled([1]), pickled({"a": 1}), pickled_tensor(), pickled(None)])
def test_no_weights(tmp_path, program):
    assert "not a dictionary of tensors" in refused(archive(tmp_path / "x.pth", program))


@pytest.mark.parametrize(
    "tensor",
    [
        {"numel": 7},
        {"key": "1"},
        {"key": 0},
        {"offset": 1},
        {"offset": -1},
        {"offset": 0.5},
        {"shape": (3, 3)},
        {"shape": (-2, 3)},
        {"shape": (2, 3, 1)},
        {"strides": (3, -1)},
        {"strides": (2**62, 1)},
        {"shape": (2**62, 0), "strides": (0, 0)},
        {"shape": (1,) * 70, "strides": (1,) * 70},
        {"numel": 2**70},
        {"numel": -1},
        {"storage": "torch DoubleStorage"},
        {"storage": "collections OrderedDict"},
    ],
)
def test_tensor_outside_its_storage(tmp_path, tensor):
    assert "damaged" in refused(archive(tmp_path / "x.pth", pickled_dict(w=pickled_tensor(**tensor))))


class Command:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_hostile_pickle_is_refused_and_not_run(tmp_path, protocol):
    made = tmp_path / "made"
    for command in (Command(os.mkdir, str(made)), Command(eval, f"open({str(made)!r}, 'w')")):
        hostile = pickle.dumps({"w": command}, protocol=protocol)
        path = archive(tmp_path / "x.pth", hostile[2:-1])
        message = refused(path)
        assert "mkdir" in message or "eval" in message
        assert "Nothing was run" in message
        assert not made.exists()


@pytest.mark.parametrize(
    "program",
    [
        pickled_global("torch load"),
        pickled_global("torch._utils _rebuild_tensor_v2") + b"}" + pickled("__defaults__") + b"Nsb",
        pickled_global("collections OrderedDict") + b"}b",
        pickled_global("torch._utils _rebuild_tensor_v2") + b")R",
        pickled_global("torch FloatStorage") + b")R",
        pickled_global("torch.FloatStorage __init__"),
        pickled("os.system") + b"(" + pickled("true") + b"tR",
        b"(ios\nsystem\n",
        b"\x82\x01",
    ],
)
def test_pickle_instructions_that_are_refused(tmp_path, program):
    assert "Nothing was run" in refused(archive(tmp_path / "x.pth", program))


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b"0",
        b"t",
        b"h\x00",
        b"a",
        b"}}a",
        b"](N" + b"u",
        b"})K\x01s",
        b"r\xff\xff\xff\xff",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"NQ",
        b"\x95\xff\xff\xff\xff\xff\xff\xff\xff",
        b"X\x02\x00\x00\x00\xff\xff",
    ],
)
def test_damaged_pickle(tmp_path, program):
    refused(archive(tmp_path / "x.pth", program))


def test_other_zips(tmp_path):
    program, path = pickled_dict(w=pickled_tensor()), tmp_path / "x.pth"
    assert "compressed zip" in refused(archive(path, program, compression=zipfile.ZIP_DEFLATED))
    assert "byte order b'big'" in refused(archive(path, program, byteorder="big"))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")
    assert "not a PyTorch checkpoint" in refused(path)
    path.write_bytes(pickle.dumps({"w": 1}, protocol=2))
    assert "before 1.6" in refused(path)


def test_dtype_tables_have_no_repeats():
    assert len(set(safetensors.DTYPES.values())) == len(safetensors.DTYPES)
    assert len(set(pickles.DTYPES.values())) == len(pickles.DTYPES)
