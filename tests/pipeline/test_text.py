"""The text encoder that loads when it is needed, and its cache of embeddings."""

import logging
import os

import jax.numpy as jnp
import numpy as np
import pytest

from turbojax.models.umt5 import encode_text
from turbojax.pipeline.text import PromptCache, TextEncoder, fingerprint
from turbojax.weights.io import read_tensors, write_safetensors

BIRD, CAT = "a red bird in the sky", "a green cat on the street"


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "turbojax" / "prompts"


def open_demo(demo, **options) -> TextEncoder:
    options = {"dtype": jnp.float32} | options
    return TextEncoder.from_files(demo / "models_t5_umt5-xxl-enc-bf16.pth", demo / "google" / "umt5-xxl", **options)


def entries(folder) -> list:
    return sorted(folder.glob("*"))


def test_a_known_prompt_needs_no_network(demo, own_folder):
    text = open_demo(demo)
    assert not text.loaded
    both = text([BIRD, CAT])
    assert text.loaded
    assert (both.shape, both.dtype) == ((2, 512, 64), np.float32)
    ids, mask = text.tokenizer([BIRD])
    np.testing.assert_array_equal(both[:1], encode_text(text.encoder, text.table, ids, mask))
    assert len(entries(own_folder)) == 2
    again = open_demo(demo)
    np.testing.assert_array_equal(again([CAT, f"  {BIRD}\n", CAT]), both[[1, 0, 1]])
    assert not again.loaded
    again(["a blue car"])
    assert again.loaded
    again.drop()
    assert not again.loaded
    np.testing.assert_array_equal(again.encoder.norm.weight[...], text.encoder.norm.weight[...])


def test_prompts_that_are_cut_are_told(demo, caplog):
    words = " ".join(f"{i:03}" for i in range(200))  # four tokens each
    text = open_demo(demo, cache=False)
    text([BIRD, words])
    assert text.cut([BIRD]) == []
    (line,) = [record.getMessage() for record in caplog.records if "is cut" in record.getMessage()]
    assert line.startswith("the prompt has 800 tokens, of which the text encoder reads 511: it is cut at '127 128 129")


def test_a_token_table_of_zeros_is_told(demo, tmp_path, caplog):
    stored = dict(read_tensors(demo / "models_t5_umt5-xxl-enc-bf16.pth"))
    stored["token_embedding.weight"] = np.zeros_like(stored["token_embedding.weight"])
    path = tmp_path / "x.safetensors"
    write_safetensors(path, stored.items(), stored)
    TextEncoder.from_files(path, demo / "google" / "umt5-xxl", dtype=jnp.float32, cache=False)([BIRD])
    assert "the token table is all zero for 7 of 7 tokens; " in caplog.text
    caplog.clear()
    open_demo(demo, cache=False)([BIRD])
    assert "token table" not in caplog.text


def test_without_a_cache_nothing_is_written(demo, own_folder):
    first = open_demo(demo, cache=False)([BIRD])
    np.testing.assert_array_equal(open_demo(demo, cache=False)([BIRD]), first)
    assert not own_folder.exists()


def test_dtypes_do_not_share_entries(demo, own_folder):
    open_demo(demo)([BIRD])
    half = open_demo(demo, dtype=jnp.bfloat16)
    assert half([BIRD]).dtype == jnp.bfloat16
    assert half.loaded
    assert half.cache.fingerprint == open_demo(demo, dtype="bfloat16").cache.fingerprint


DAMAGES = {
    "empty": lambda whole: b"",
    "no file of tensors": lambda whole: b"not a file of tensors",
    "cut": lambda whole: whole[:-8],
    "zeros": lambda whole: bytes(len(whole)),
    "zeros for numbers": lambda whole: whole[: 8 + int.from_bytes(whole[:8], "little")].ljust(len(whole), b"\0"),
    "a bit": lambda whole: whole[:-1001] + bytes([whole[-1001] ^ 1]) + whole[-1000:],
    "no checksum": lambda whole: whole.replace(b"sha256", b"sha255"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again(demo, own_folder, damage):
    text = open_demo(demo)
    expected = text([BIRD])
    (entry,) = entries(own_folder)
    whole = entry.read_bytes()
    entry.write_bytes(DAMAGES[damage](whole))
    assert entry.read_bytes() != whole
    again = open_demo(demo)
    np.testing.assert_array_equal(again([BIRD]), expected)
    assert again.loaded
    assert entry.read_bytes() == whole
    for wrong in (expected[0, :1], np.full_like(expected[0, : text.tokenizer([BIRD])[1].sum()], np.nan)):
        tokens = text.tokenizer([BIRD])[0][0, : text.tokenizer([BIRD])[1].sum()]
        text.cache.put(tokens, wrong)
        assert text.cache.get(tokens, text.config) is None


def test_another_prompts_entry_is_none_of_this_one(demo, own_folder):
    text = open_demo(demo)
    expected = text([BIRD])
    (entry,) = entries(own_folder)
    text(["a red bird in the sea"])
    (other,) = set(entries(own_folder)) - {entry}
    entry.write_bytes(other.read_bytes())
    np.testing.assert_array_equal(open_demo(demo)([BIRD]), expected)


def test_without_a_home_folder_there_is_a_warning(demo, homeless, caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert np.isfinite(open_demo(demo)([BIRD])).all()
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("Embeddings of prompts are not kept: no home folder is known")


def test_a_folder_that_cannot_be_written_is_a_warning(demo, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    text = open_demo(demo)
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert np.isfinite(text([BIRD])).all()
    assert [record.message.partition(":")[0] for record in caplog.records] == ["The prompt's embedding is not kept"]


def test_the_entries_used_longest_ago_go(tmp_path, demo_pipe):
    config = demo_pipe.text.config
    cache = PromptCache("x", tmp_path, max_bytes=3 * 2400)  # an entry has 8 x 64 float32 and a header: 2,136 bytes
    prompts = [np.full(8, i, np.int32) for i in range(4)]
    embeddings = [np.full((8, config.dim), i, np.float32) for i in range(4)]
    for i in range(3):
        cache.put(prompts[i], embeddings[i])
        os.utime(cache.path(prompts[i]), (i, i))
    np.testing.assert_array_equal(cache.get(prompts[0], config), embeddings[0])  # used now
    cache.put(prompts[3], embeddings[3])
    assert [cache.get(prompt, config) is not None for prompt in prompts] == [True, False, True, True]


def test_fingerprints():
    tensors = {name: np.arange(10_000, dtype=np.float32).reshape(100, 100) for name in "ab"}
    seen = {fingerprint(tensors), fingerprint(tensors, "bfloat16")}
    for place in (0, 5_000, 9_999):
        changed = {name: array.copy() for name, array in tensors.items()}
        changed["b"].reshape(-1)[place] += 1
        seen.add(fingerprint(changed))
    seen.add(fingerprint({"a": tensors["a"], "c": tensors["b"]}))
    seen.add(fingerprint({"a": tensors["a"], "b": tensors["b"].reshape(50, 200)}))
    seen.add(fingerprint({"a": tensors["a"], "b": tensors["b"].view(np.int32)}))
    assert len(seen) == 8
    assert fingerprint(dict(reversed(tensors.items()))) == fingerprint(tensors)
