"""Shards and their reader: what is written is read; batches, epochs, processes and resuming; damaged folders."""

import dataclasses
import itertools
import json
import os
import sys

import ml_dtypes
import numpy as np
import pytest

from turbojax.errors import CheckpointError, UserError
from turbojax.train.data import (
    Index,
    Sample,
    batches,
    open_shards,
    read_index,
    write_index,
    write_negative,
    write_shard,
)
from turbojax.weights.io import read_tensors, write_safetensors

INDEX = Index(
    latents=(2, 2, 3, 4),
    text_dim=8,
    dtype="bfloat16",
    num_frames=5,
    height=16,
    width=24,
    fps=16,
    vae="vae",
    text_encoder="umt5",
    negative_prompt="blurred",
    shard_size=5,
)
SIZES = (3, 5, 2)


def sample(i: int, index: Index = INDEX) -> Sample:
    """Sample i: latents begin with i, i + 1 rows of text begin with i."""
    rng = np.random.default_rng(i)
    latents = rng.standard_normal(index.latents).astype(index.dtype)
    text = rng.standard_normal((i + 1, index.text_dim)).astype(index.dtype)
    latents[0, 0, 0, 0] = text[0, 0] = i
    return Sample(latents, text, f"{i}.mp4", f"clip {i}, \u732b")


def write(folder, index: Index = INDEX, sizes=SIZES):
    count, files = itertools.count(), {}
    for number, size in enumerate(sizes):
        name = f"shard-{number:05}.safetensors"
        write_shard(folder / name, index, [sample(next(count), index) for _ in range(size)])
        files[name] = size
    write_negative(folder, np.ones((3, index.text_dim), index.dtype))
    write_index(folder, index, files)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return open_shards(write(tmp_path_factory.mktemp("data")))


def numbers(batch) -> list[int]:
    first = batch["latents"][:, 0, 0, 0, 0].astype(int)
    np.testing.assert_array_equal(batch["text"][:, 0, 0].astype(int), first)
    return first.tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_written_is_read(tmp_path, dtype):
    shards = open_shards(write(tmp_path, dataclasses.replace(INDEX, dtype=dtype)))
    assert len(shards) == sum(SIZES)
    for i in range(len(shards)):
        expected, read = sample(i, shards.index), shards[i]
        assert read["latents"].dtype == read["text"].dtype == np.dtype(dtype)
        np.testing.assert_array_equal(read["latents"], expected.latents)
        np.testing.assert_array_equal(read["text"][: i + 1], expected.text)
        assert read["text"].shape == (15, 8)
        assert not read["text"][i + 1 :].any()
        assert shards.describe(i) == (f"{i}.mp4", f"clip {i}, \u732b")
    negative = shards.negative()
    assert negative.shape == (15, 8)
    assert (negative.sum(), negative.dtype) == (24, np.dtype(dtype))
    with pytest.raises(IndexError):
        shards[len(shards)]


def test_only_the_rows_that_exist_are_stored(folder):
    tensors = read_tensors(folder / "shard-00001.safetensors")
    assert tensors["text"].shape == (sum(range(4, 9)), 8)
    assert tensors["text_lengths"].tolist() == [4, 5, 6, 7, 8]


def test_batches(shards):
    data = batches(shards, batch_size=4, seed=0)
    for _ in range(3):
        batch = next(data)
        assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
            "latents": ((4, *INDEX.latents), ml_dtypes.bfloat16),
            "text": ((4, 15, 8), ml_dtypes.bfloat16),
        }
        for row, i in enumerate(numbers(batch)):
            for name, value in shards[i].items():
                np.testing.assert_array_equal(batch[name][row], value)


def test_each_epoch_has_every_sample_in_an_order_of_its_own(shards):
    seen = [i for batch in itertools.islice(batches(shards, batch_size=4, seed=0), 15) for i in numbers(batch)]
    epochs = [seen[start : start + len(shards)] for start in range(0, len(seen), len(shards))]
    assert all(sorted(epoch) == list(range(len(shards))) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == len(epochs)
    assert seen != [i for b in itertools.islice(batches(shards, batch_size=4, seed=1), 15) for i in numbers(b)]


@pytest.mark.parametrize("done", [0, 1, 7])
def test_resuming_is_exact(shards, done):
    data = batches(shards, batch_size=4, seed=3)
    for _ in range(done):
        next(data)
    state = json.loads(json.dumps(data.get_state()))
    resumed = batches(shards, batch_size=4, seed=3, num_threads=1, prefetch=1)
    resumed.set_state(state)
    for _ in range(6):
        wanted, got = next(data), next(resumed)
        assert all(wanted[name].tobytes() == got[name].tobytes() for name in wanted)
    data.set_state(state)  # backwards, in the same iterator
    again = batches(shards, batch_size=4, seed=3)
    again.set_state(state)
    assert numbers(next(data)) == numbers(next(again))


def test_processes_share_each_batch(shards):
    whole = batches(shards, batch_size=4, seed=5)
    parts = [batches(shards, batch_size=4, seed=5, share=(i, 2)) for i in range(2)]
    for _ in range(8):
        shares = [numbers(next(part)) for part in parts]
        assert [len(share) for share in shares] == [2, 2]
        assert sorted(shares[0] + shares[1]) == sorted(numbers(next(whole)))


def test_settings_that_cannot_be(shards):
    for options, message in (
        ({"batch_size": 0}, "batch_size=0 must be a multiple of the 1 processes"),
        ({"batch_size": 3, "share": (0, 2)}, "batch_size=3 must be a multiple of the 2"),
        ({"share": (2, 2)}, "process 2 is not one of 2"),
        ({"seed": -1}, r"seed=-1 must be in 0\.\.4294967295"),
    ):
        with pytest.raises(UserError, match=message):
            batches(shards, **{"batch_size": 4, "seed": 0, **options})
    data = batches(shards, batch_size=4, seed=0)
    state = data.get_state()
    for change in ({"seed": 1}, {"batch_size": 2}, {"batch": -1}, {"batch": None}):
        with pytest.raises(UserError, match=f"{next(iter(change))}="):
            data.set_state(state | change)


@pytest.mark.parametrize("change", [{"samples": 11}, {"data": "other"}, {"samples": 11, "data": "other"}])
def test_other_data_than_before(shards, change, caplog):
    """It goes on at the same batch, with one warning, and says no more when it goes on from there."""
    data = batches(shards, batch_size=4, seed=0)
    data.set_state(data.get_state() | {"batch": 2} | change)
    assert [record.getMessage() for record in caplog.records] == [
        f"The run was begun with other data, of {change.get('samples', 10)} samples; it goes on with the 10 of now, "
        "in their own order"
    ]
    expected = next(itertools.islice(batches(shards, batch_size=4, seed=0), 2, None))
    assert numbers(next(data)) == numbers(expected)
    caplog.clear()
    data.set_state(data.get_state())
    assert not caplog.records


def test_without_grain(shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(UserError, match=r"pip install 'turbojax\[train\]'"):
        batches(shards, batch_size=1, seed=0)


# Folders that cannot be used.


def rewrite(path, **changes):
    tensors = {name: np.array(value) for name, value in read_tensors(path).items()} | changes
    tensors = {name: value for name, value in tensors.items() if value is not None}
    write_safetensors(path, tensors.items(), tensors)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def edit_index(*changes):
    """Every change replaces what its path of keys leads to; ... removes it."""

    def edit(folder):
        content = json.loads((folder / "index.json").read_text())
        for *path, last, value in changes:
            place = content
            for key in path:
                place = place[key]
            if value is ...:
                del place[last]
            else:
                place[last] = value
        (folder / "index.json").write_text(json.dumps(content))

    return edit


SHARD = "shard-00001.safetensors"
DAMAGES = {
    "missing shard": (lambda f: (f / SHARD).unlink(), f"{SHARD} is missing"),
    "cut shard": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-9]), f"{SHARD} is cut off or no"),
    "foreign file": (lambda f: (f / SHARD).write_text("hello"), f"{SHARD} is cut off or no safetensors file"),
    "foreign tensors": (lambda f: rewrite(f / SHARD, latents=None), f"{SHARD} holds nothing as latents"),
    "other shape": (
        lambda f: rewrite(f / SHARD, latents=np.zeros((5, 2, 2, 3, 5), ml_dtypes.bfloat16)),
        r"holds bfloat16\[5, 2, 2, 3, 5\] as latents, expected bfloat16\[5, 2, 2, 3, 4\]",
    ),
    "other dtype": (
        lambda f: rewrite(f / SHARD, text=np.zeros((30, 8), np.float32)),
        r"holds float32\[30, 8\] as text, expected bfloat16\[30, 8\]",
    ),
    "rows and lengths": (
        lambda f: rewrite(f / SHARD, text_lengths=np.full(5, 7, np.int32)),
        r"bfloat16\[30, 8\] as text, expected bfloat16\[35, 8\]",
    ),
    "negative length": (
        lambda f: rewrite(f / SHARD, text_lengths=np.asarray([-1, 11, 10, 5, 5], np.int32)),
        "holds prompts that do not have 0 to 512 rows",
    ),
    "lengths of another kind": (
        lambda f: rewrite(f / SHARD, text_lengths=np.full(5, np.nan, np.float32)),
        f"{SHARD} is no shard of training data",
    ),
    "another safetensors file": (
        lambda f: rewrite(f / SHARD, latents=None, text=None, text_lengths=None, x=np.zeros(3)),
        f"{SHARD} is no shard of training data",
    ),
    "another count": (lambda f: write_index(f, INDEX, {SHARD: 4}), f"{SHARD} holds 5 samples and index.json says 4"),
    "no index": (lambda f: (f / "index.json").unlink(), "holds no index.json, so no training data"),
    "damaged index": (lambda f: (f / "index.json").write_text("{"), "index.json is no JSON"),
    "nested index": (lambda f: (f / "index.json").write_text(100_000 * "["), "index.json: it is nested 100000 deep"),
    "list as index": (lambda f: (f / "index.json").write_text("[]"), "index.json: it is .* must be an object"),
    "pipe as index": (lambda f: pipe(f / "index.json"), "index.json is not a regular file"),
    "folder as index": (lambda f: (f / "index.json").unlink() or (f / "index.json").mkdir(), "index.json"),
    "pipe as shard": (lambda f: pipe(f / SHARD), f"{SHARD} is not a regular file"),
    "pipe as negative": (lambda f: pipe(f / "negative.safetensors"), "negative.safetensors is not a regular file"),
    "missing negative": (lambda f: (f / "negative.safetensors").unlink(), "negative.safetensors is missing"),
    "negative of another dtype": (
        lambda f: write_negative(f, np.ones((3, 8), np.float32)),
        r"negative.safetensors holds no text of width 8 in bfloat16",
    ),
    "negative of NaN": (
        lambda f: write_negative(f, np.full((3, 8), np.nan, ml_dtypes.bfloat16)),
        r"negative.safetensors holds NaN or infinity",
    ),
    "shard without a field": (edit_index(("shards", [{}])), r"shards\[0\].file is missing"),
    "shard with a path": (
        edit_index(("shards", 1, "file", "../x")),
        r"shards\[1\].file is '../x' and must be a file's",
    ),
    "shard above": (edit_index(("shards", 1, "file", "..")), r"shards\[1\].file is '..' and must be a file's name"),
    "shard without samples": (edit_index(("shards", 1, "samples", 0)), r"shards\[1\].samples is 0 and must be a whole"),
    "shard of 10^30": (edit_index(("shards", 1, "samples", 10**30)), r"shards\[1\].samples is 10+ and must be a whole"),
    "shard twice": (edit_index(("shards", 0, "file", SHARD)), "index.json lists a shard twice"),
    "latents of 10^30": (edit_index(("latents", 0, 10**30)), r"latents\[0\] is 10+ and must be a whole number"),
    "latents of 0": (edit_index(("latents", 3, 0)), r"latents\[3\] is 0 and must be a whole number from 1"),
    "latents as text": (edit_index(("latents", "2 2 3 4")), r"latents is '2 2 3 4' and must be a list of 4 items"),
    "five axes": (edit_index(("latents", [2, 2, 3, 4, 1])), r"latents is \[2, 2, 3, 4, ...\] and must be a list of 4"),
    "true as a width": (edit_index(("text_dim", True)), "text_dim is True and must be a whole number"),
    "a fraction": (edit_index(("num_frames", 5.5)), "num_frames is 5.5 and must be a whole number"),
    "no height": (edit_index(("height", ...)), "height is missing"),
    "unknown field": (edit_index(("heigth", 16)), "has the unknown field 'heigth'"),
    "number as a name": (edit_index(("vae", 5)), "vae is 5 and must be text"),
    "index of another dtype": (edit_index(("dtype", "int8")), "dtype is 'int8' and must be"),
    "newer index": (edit_index(("version", 2)), "version is 2 and must be 1"),
    "foreign index": (edit_index(("format", "other")), 'format is .other. and must be "turbojax-latents"'),
    "no shards": (lambda f: write_index(f, INDEX, {}), "lists no shards"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders(folder, name):
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        open_shards(folder)
    assert "scripts/make_shards.py" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value).replace(str(folder), "")) < 300


CHANGES = {
    "written again": lambda path: rewrite(path),
    "cut": lambda path: os.truncate(path, 100),
    "removed": lambda path: path.unlink(),
    "a pipe": lambda path: pipe(path),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_shard_that_changes_while_it_is_in_use(folder, name):
    shards = open_shards(folder)
    assert shards[4]
    CHANGES[name](folder / SHARD)
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=f"{SHARD} (has changed while it was in use; run|is missing or cannot)"
        ):
            shards.read([0, 4])


@pytest.mark.parametrize("text", ["", "[]", "{}", 100_000 * "[", '[{"source": 1, "caption": ""}]', None])
def test_captions_that_cannot_be_read(folder, text):
    tensors = {name: np.array(value) for name, value in read_tensors(folder / SHARD).items()}
    metadata = {} if text is None else {"samples": text}
    write_safetensors(folder / SHARD, tensors.items(), tensors, metadata=metadata)
    with pytest.raises(CheckpointError, match=f"samples in the header of .*{SHARD}.*; make it again"):
        open_shards(folder).describe(4)


def test_nan_is_found_when_read(folder):
    latents = np.array(read_tensors(folder / SHARD)["latents"])
    latents[2, 1, 1, 1, 1] = np.nan
    rewrite(folder / SHARD, latents=latents)
    shards = open_shards(folder)
    assert shards[4]
    message = f"{SHARD}: the latents of sample 2 hold NaN or infinity"
    with pytest.raises(CheckpointError, match=message):
        shards[5]
    with pytest.raises(CheckpointError, match=message):
        list(itertools.islice(batches(shards, batch_size=5, seed=0), 2))


def test_negative_that_does_not_fit(folder):
    write_negative(folder, np.zeros((1, 9), ml_dtypes.bfloat16))
    with pytest.raises(CheckpointError, match=r"negative\.safetensors holds no text of width 8"):
        open_shards(folder).negative()


def test_samples_that_do_not_fit_are_not_written(folder):
    before = (folder / SHARD).read_bytes()
    bad = sample(0)._replace(latents=np.zeros((2, 2, 3, 5), ml_dtypes.bfloat16))
    with pytest.raises(CheckpointError, match="latents"):
        write_shard(folder / SHARD, INDEX, [bad])
    assert (folder / SHARD).read_bytes() == before
    assert not list(folder.glob("*part*"))


def test_shards_beside_the_index_are_not_read(folder):
    (folder / "shard-00009.safetensors").write_text("half")
    assert len(open_shards(folder)) == 10
    assert read_index(folder)[1] == {f"shard-{i:05}.safetensors": n for i, n in enumerate(SIZES)}
