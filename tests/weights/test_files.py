"""Which file holds what, in local folders and (with the hub's functions replaced) in Hugging Face repositories."""

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError

from turbojax.errors import CheckpointError, UserError
from turbojax.weights import files
from turbojax.weights.files import PATTERNS, SHARED_REPOSITORY, find, open_repository

TURBO = "TurboWan2.1-T2V-1.3B-480P"
SHARD = "diffusion_pytorch_model-0000{}-of-00002.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"

# The files of each published arrangement, and what is to be found among them.
FOLDERS: dict[str, tuple[list[str], dict[str, str | None]]] = {
    "turbodiffusion": (
        ["README.md", f"{TURBO}.pth", f"{TURBO}-quant.pth"],
        {"transformer": f"{TURBO}.pth", "vae": None, "text_encoder": None, "tokenizer": None},
    ),
    "wan-ai": (
        [
            *("config.json", "diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth", "assets/logo.png"),
            *("models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json", "google/umt5-xxl/spiece.model"),
        ],
        {
            "transformer": "diffusion_pytorch_model.safetensors",
            "vae": "Wan2.1_VAE.pth",
            "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
            "tokenizer": "google/umt5-xxl/tokenizer.json",
        },
    ),
    "wan-ai, sharded, image to video": (
        [
            *(INDEX, SHARD.format(1), SHARD.format(2), "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"),
            *("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", "google/umt5-xxl/spiece.model"),
        ],
        {"transformer": INDEX, "tokenizer": "google/umt5-xxl/spiece.model"},
    ),
    "diffusers": (
        [
            *("model_index.json", f"transformer/{INDEX}", "transformer/config.json"),
            *(f"transformer/{SHARD.format(1)}", f"transformer/{SHARD.format(2)}"),
            *("vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"),
            *("text_encoder/model.safetensors.index.json", "text_encoder/model-00001-of-00001.safetensors"),
        ],
        {
            "transformer": f"transformer/{INDEX}",
            "vae": "vae/diffusion_pytorch_model.safetensors",
            "text_encoder": "text_encoder/model.safetensors.index.json",
            "tokenizer": "tokenizer/tokenizer.json",
        },
    ),
    "converted to safetensors": (
        ["transformer.safetensors", "vae.safetensors", "text_encoder.safetensors", "google/umt5-xxl/tokenizer.json"],
        {
            "transformer": "transformer.safetensors",
            "vae": "vae.safetensors",
            "text_encoder": "text_encoder.safetensors",
            "tokenizer": "google/umt5-xxl/tokenizer.json",
        },
    ),
    "converted to Orbax": (["turbojax.json", "vae.safetensors"], {"transformer": ".", "vae": "vae.safetensors"}),
    "converted to Orbax, one of many": (
        ["transformer/turbojax.json", "tokenizer.json"],
        {"transformer": "transformer", "tokenizer": "tokenizer.json"},
    ),
    "any name": (["my model.safetensors", "notes.txt"], {"transformer": "my model.safetensors", "vae": None}),
}


A14B = "TurboWan2.2-I2V-A14B-{}-720P{}.pth"
EXPERTS: dict[str, tuple[list[str], bool | None, tuple[str, str | None]]] = {
    "turbodiffusion": (
        [A14B.format(name, kind) for name in ("high", "low") for kind in ("", "-quant")],
        True,
        (A14B.format("high", "-quant"), A14B.format("low", "-quant")),
    ),
    "wan-ai": (
        [
            f"{name}_noise_model/{file}"
            for name in ("high", "low")
            for file in (INDEX, SHARD.format(1), SHARD.format(2))
        ],
        None,
        (f"high_noise_model/{INDEX}", f"low_noise_model/{INDEX}"),
    ),
    "diffusers": (
        ["transformer/diffusion_pytorch_model.safetensors", "transformer_2/diffusion_pytorch_model.safetensors"],
        None,
        ("transformer/diffusion_pytorch_model.safetensors", "transformer_2/diffusion_pytorch_model.safetensors"),
    ),
    "converted": (["high/turbojax.json", "low/turbojax.json", "vae.safetensors"], None, ("high", "low")),
    "a single network": ([f"{TURBO}.pth", "Wan2.1_VAE.pth"], None, (f"{TURBO}.pth", None)),
    "no expert": (["slow-flow.pth"], None, ("slow-flow.pth", None)),
}


def fill(folder: Path, names: list[str]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        index = {"weight_map": {"a": SHARD.format(1), "b": SHARD.format(2)}}
        path.write_text(json.dumps(index) if name.endswith("index.json") else name)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that publishes names as "owner/name"; returns the list of what was downloaded."""
    downloaded: list[str] = []
    folder = tmp_path / "cache"

    def publish(names: list[str]) -> list[str]:
        fill(folder, names)
        monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repository: names)
        return downloaded

    def download(repository: str, name: str) -> str:
        assert repository == "owner/name"
        downloaded.append(name)
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return publish


@pytest.mark.parametrize("names", FOLDERS)
def test_local_folders(tmp_path, names):
    published, expected = FOLDERS[names]
    repository = open_repository(fill(tmp_path, published))
    for component, name in expected.items():
        assert find(repository, component) == (None if name is None else tmp_path / name), component
    for name in published:
        if "/" not in name:  # a file stands for its folder
            assert open_repository(tmp_path / name).files == repository.files


@pytest.mark.parametrize("names", FOLDERS)
def test_repositories(hub, names):
    published, expected = FOLDERS[names]
    downloaded = hub(published)
    repository = open_repository("owner/name")
    assert not downloaded
    for component, name in expected.items():
        path = find(repository, component)
        assert (path is None) == (name is None)
    if names == "diffusers":
        shards = [f"transformer/{SHARD.format(i)}" for i in (1, 2)]
        assert downloaded[:4] == [f"transformer/{INDEX}", "transformer/config.json", *shards]
    if names == "wan-ai":
        assert downloaded[:2] == ["diffusion_pytorch_model.safetensors", "config.json"]
    if names == "turbodiffusion":
        assert downloaded == [f"{TURBO}.pth"]


@pytest.mark.parametrize(
    ("quantized", "published", "expected"),
    [
        (None, [".pth", "-quant.pth"], ".pth"),
        (False, [".pth", "-quant.pth"], ".pth"),
        (True, [".pth", "-quant.pth"], "-quant.pth"),
        (True, [".pth"], ".pth"),
        (False, ["-quant.pth"], "-quant.pth"),
        (None, ["-quant.pth"], "-quant.pth"),
    ],
)
def test_quantized_or_plain(tmp_path, quantized, published, expected):
    repository = open_repository(fill(tmp_path, [TURBO + suffix for suffix in published]))
    assert find(repository, "transformer", quantized=quantized) == tmp_path / (TURBO + expected)


def test_several_transformers(tmp_path):
    names = [f"TurboWan2.2-I2V-A14B-{noise}-720P{q}.pth" for noise in ("high", "low") for q in ("", "-quant")]
    repository = open_repository(fill(tmp_path, names))
    for quantized, suffix in ((None, ""), (True, "-quant")):
        with pytest.raises(CheckpointError) as error:
            find(repository, "transformer", quantized=quantized)
        listed = ", ".join(f"TurboWan2.2-I2V-A14B-{noise}-720P{suffix}.pth" for noise in ("high", "low"))
        assert f"several transformers: {listed}; give one as the path" in str(error.value)


def test_every_component_has_patterns():
    experts = {"high-noise expert", "low-noise expert"}
    assert set(PATTERNS) == {"transformer", "vae", "text_encoder", "tokenizer", "image_encoder"} | experts


@pytest.mark.parametrize("index", ["<html>", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": [1]}}'])
def test_damaged_index(tmp_path, index):
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json.*; download it again"):
        find(open_repository(tmp_path), "transformer")


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "models/nothing.pth", "/nowhere/x.safetensors", "./x", "owner/"])
def test_what_is_neither_file_nor_repository(name):
    with pytest.raises(UserError, match="is neither a file, a folder nor a repository"):
        open_repository(name)


def test_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path / "models", ["transformer.safetensors"])
    assert open_repository("~/models").files == ["transformer.safetensors"]


# The hub itself, offline as it is in tests.


def test_without_a_network():
    with pytest.raises(UserError) as error:
        open_repository(SHARED_REPOSITORY)
    message = str(error.value)
    assert message.startswith(f"{SHARED_REPOSITORY} could not be downloaded (")
    assert message.endswith("check the name and the network, or give a local path")
    assert "\n" not in message
    assert len(message) < 400


def test_without_a_network_but_downloaded_before(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, local_files_only: fill(tmp_path, ["x.pth"]))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, name: tmp_path / name)
    assert find(open_repository(SHARED_REPOSITORY), "transformer") == tmp_path / "x.pth"


def test_a_download_that_fails(hub, monkeypatch):
    hub([f"{TURBO}.pth"])

    def fail(repository, name):
        raise EntryNotFoundError("404 Client Error.\n\nEntry Not Found for url: https://huggingface.co/x")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UserError) as error:
        find(open_repository("owner/name"), "transformer")
    assert str(error.value).startswith(f"{TURBO}.pth of owner/name could not be downloaded (404 Client Error.")
    assert "\n" not in str(error.value)


def test_reasons_are_one_short_line():
    assert "TimeoutError" in files.unreachable("x", TimeoutError())
    assert len(files.unreachable("x", OSError("why " * 1000))) < 300


@pytest.mark.parametrize(("names", "quantized", "expected"), EXPERTS.values(), ids=EXPERTS)
def test_experts(tmp_path, names, quantized, expected):
    fill(tmp_path, names)
    high, low = expected
    found = tmp_path / high, low and tmp_path / low
    assert files.find_networks(tmp_path, quantized=quantized) == found
    if "/" not in high:  # by the path of either one
        assert files.find_networks(found[0]) == found
        assert low is None or files.find_networks(found[1]) == found


def test_one_expert_alone(tmp_path):
    fill(tmp_path, [A14B.format("low", "")])
    for path in (tmp_path, tmp_path / A14B.format("low", "")):
        with pytest.raises(UserError, match="both are needed"):
            files.find_networks(path)
    with pytest.raises(UserError, match="holds no transformer"):
        files.find_networks(fill(tmp_path / "empty", ["notes.txt"]))


def test_without_a_home_folder_nothing_goes_to_one_of_that_name(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")  # as it expands then
    with pytest.raises(UserError, match=r"no home folder .* set HOME, or HF_HOME=FOLDER"):
        open_repository(SHARED_REPOSITORY)
