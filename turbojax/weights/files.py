"""Which file holds which component, in a folder or in a Hugging Face repository.

Names are those that Wan, TurboDiffusion and diffusers publish; see docs/checkpoints.md.
"""

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from turbojax.errors import CheckpointError, UserError
from turbojax.files import remove_stale, user_path
from turbojax.weights.io import PTH_SUFFIXES, read_index

# Has the VAE, the text encoder and the tokenizer that all Wan 2.1 models and Wan 2.2 A14B share.
SHARED_REPOSITORY = "Wan-AI/Wan2.1-T2V-1.3B"

IMAGE_ENCODER_REPOSITORY = "Wan-AI/Wan2.1-I2V-14B-480P"  # likewise, CLIP of all Wan 2.1 image to video

CONVERTED = "turbojax.json"  # marks a folder written by `scripts/convert.py --format=orbax`


def word(text: str) -> str:
    """A pattern for the word by itself, as in TurboWan2.2-I2V-A14B-high-720P or wan_high_noise."""
    return f"(?<![A-Za-z]){text}(?![A-Za-z])"


# Relative paths by component, the first pattern that matches anything decides.
PATTERNS: dict[str, tuple[str, ...]] = {
    "high-noise expert": (
        r"high/turbojax\.json",
        r"high_noise_model/diffusion_pytorch_model\.safetensors(\.index\.json)?",
        rf"[^/]*{word('high')}[^/]*\.(pth|safetensors)",
    ),
    "low-noise expert": (
        r"(low|transformer_2)/turbojax\.json",
        r"(low_noise_model|transformer_2)/diffusion_pytorch_model\.safetensors(\.index\.json)?",
        rf"[^/]*{word('low')}[^/]*\.(pth|safetensors)",
    ),
    "transformer": (
        r"(transformer/)?turbojax\.json",
        r"(transformer/)?diffusion_pytorch_model\.safetensors\.index\.json",
        r"(transformer/)?diffusion_pytorch_model\.safetensors",
        r"transformer\.safetensors",
        r"(?!models_|Wan2\.\d_VAE|vae\.|text_encoder\.)[^/]+\.(pth|safetensors)",
    ),
    "vae": (r"Wan2\.1_VAE\.(pth|safetensors)", r"vae\.safetensors", r"vae/diffusion_pytorch_model\.safetensors"),
    "text_encoder": (
        r"models_t5_umt5-xxl-enc-bf16\.(pth|safetensors)",
        r"text_encoder\.safetensors",
        r"text_encoder/model\.safetensors\.index\.json",
        r"text_encoder/model\.safetensors",
    ),
    "image_encoder": (
        r"models_clip_open-clip-xlm-roberta-large-vit-huge-14\.(pth|safetensors)",
        r"image_encoder/model\.safetensors",
    ),
    "tokenizer": (r"(google/umt5-xxl/|tokenizer/)?tokenizer\.json", r"(google/umt5-xxl/|tokenizer/)?spiece\.model"),
}


class Repository(NamedTuple):
    """Files by relative path, local or remote; `get` gives a local path, downloading where needed."""

    name: str
    files: Sequence[str]
    get: Callable[[str], Path]


def open_repository(path_or_repo: str | Path) -> Repository:
    """Opens a folder, the folder of a file, or a Hugging Face repository "owner/name"."""
    path = user_path(path_or_repo)
    remove_stale(path.parent)  # of a converted folder that lost its name when its conversion was killed
    if path.is_file():
        path = path.parent
    if path.is_dir():
        found = (p for pattern in ("[!.]*", "[!.]*/[!.]*", "google/*/[!.]*") for p in path.glob(pattern))
        files = sorted(p.relative_to(path).as_posix() for p in found if p.is_file())
        return Repository(str(path), files, lambda name: path / name)
    is_file_name = path.suffix in (*PTH_SUFFIXES, ".safetensors", ".json")
    if is_file_name or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(path_or_repo)):
        raise UserError(
            f"{str(path_or_repo)!r} is neither a file, a folder nor a repository such as {SHARED_REPOSITORY}"
        )
    return open_hub(str(path_or_repo))


def open_hub(name: str) -> Repository:
    """Opens a Hugging Face repository; downloads go to its cache folder and resume."""
    import huggingface_hub.constants

    if huggingface_hub.constants.HF_HUB_CACHE.startswith("~"):  # it would make a folder of that name
        raise UserError(f"no home folder is known to download {name} to; set HOME, or HF_HOME=FOLDER")

    def download(file: str) -> Path:
        try:
            return Path(huggingface_hub.hf_hub_download(name, file))
        except Exception as error:  # offline, refused, or no such file: the libraries below have no common class
            raise UserError(unreachable(f"{file} of {name}", error)) from error

    try:
        files = huggingface_hub.list_repo_files(name)
    except Exception as error:
        if not (files := cached_files(name)):
            raise UserError(unreachable(name, error)) from error
    return Repository(name, sorted(files), download)


def cached_files(name: str) -> list[str]:
    """Lists files of a repository that were downloaded before, for use without a network."""
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except Exception:
        return []
    return [str(p.relative_to(folder).as_posix()) for p in folder.rglob("*") if p.is_file()]


def unreachable(what: str, error: Exception) -> str:
    reason = textwrap.shorten(str(error), 160, placeholder=" ...") or type(error).__name__
    return f"{what} could not be downloaded ({reason}); check the name and the network, or give a local path"


def find(repository: Repository, component: str, *, quantized: bool | None = None) -> Path | None:
    """Finds the local path of a component's file; None if the repository has none.

    quantized: where a repository has both forms (NAME.pth and NAME-quant.pth), which one; None takes the plain one.
    """
    for pattern in PATTERNS[component]:
        matches = [name for name in repository.files if re.fullmatch(pattern, name)]
        if len(matches) > 1:
            matches = [name for name in matches if ("-quant." in name) == bool(quantized)] or matches
        if len(matches) > 1:
            raise CheckpointError(
                f"{repository.name} holds several {component}s: {', '.join(matches)}; give one as the path"
            )
        if matches:
            return fetch(repository, matches[0])
    return None


def find_networks(path_or_repo: str | Path, *, quantized: bool | None = None) -> tuple[Path, Path | None]:
    """Finds the transformer's file, or the files of the two experts for high and for low noise.

    path_or_repo: a repository, a folder, a file or a converted folder; of an expert, the other one's lies beside it.
    Raises UserError where there is none, or one expert without the other.
    """
    path, repository = user_path(path_or_repo), open_repository(path_or_repo)
    if path.is_file() or (path / CONVERTED).is_file():
        return find_other(path)
    low = find(repository, "low-noise expert", quantized=quantized)
    high = find(repository, "high-noise expert", quantized=quantized)
    if low and "transformer_2" in (low.name, low.parent.name):
        high = find(repository, "transformer")
    if high and low:
        return high, low
    for one in filter(None, (high, low)):
        raise UserError(f"{repository.name} holds {one.name} without the other expert's file; both are needed")
    return sole_transformer(repository, quantized=quantized), None


def sole_transformer(repository: Repository, *, quantized: bool | None = None) -> Path:
    """Finds the transformer that a repository holds; raises UserError where there is none."""
    found = find(repository, "transformer", quantized=quantized)
    if found is None:
        raise UserError(f"{repository.name} holds no transformer checkpoint; give the file's path")
    return found


def find_other(path: Path) -> tuple[Path, Path | None]:
    """Returns a file, and the other expert's if its name says "high" or "low"; the one for high noise first."""
    for own, other in (("high", "low"), ("low", "high")):
        if re.search(word(own), path.name):
            beside = path.with_name(re.sub(word(own), other, path.name))
            if not beside.exists():
                raise UserError(
                    f"{path.name} is one of two experts and {beside.name} is not beside it; both are needed"
                )
            return (path, beside) if own == "high" else (beside, path)
    return path, None


def component_path(path: str | Path, component: str) -> Path:
    """The component's file where `path` is a folder with several, such as an official one; else the path itself."""
    path = user_path(path)
    return (find(open_repository(path), component) if path.is_dir() else None) or path


def transformer_path(path_or_repo: str | Path) -> Path:
    """The file of a transformer: itself, or the plain (not quantized) one of a folder or repository."""
    path = user_path(path_or_repo)
    return path if path.is_file() else sole_transformer(open_repository(path_or_repo))


def find_components(repository: Repository | None, given: Mapping[str, str | Path | None]) -> dict[str, Path]:
    """Finds each component: the path that is given, else the repository's own, else one of a repository that has it.

    Raises UserError for a component that is nowhere.
    """
    where = {}
    for name, path in given.items():
        own = component_path(path, name) if path else find(repository, name) if repository else None
        shared = IMAGE_ENCODER_REPOSITORY if name == "image_encoder" else SHARED_REPOSITORY
        found = own or find(open_repository(shared), name)
        if found is None:
            looked = f"{repository.name} or {shared}" if repository else shared
            raise UserError(f"no {name} was found in {looked}; give {name}=PATH")
        where[name] = found
    return where


def fetch(repository: Repository, name: str) -> Path:
    """Gets a file with what belongs to it: the shards of an index, the configuration beside it."""
    path = repository.get(name)
    folder = name.rpartition("/")[0]
    beside = [n for n in repository.files if n.rpartition("/")[0] == folder]
    for other in beside:
        if other.endswith("/config.json") or other == "config.json":
            repository.get(other)
    if name.endswith(".index.json"):
        for shard in sorted(set(read_index(path).values())):
            if (sibling := f"{folder}/{shard}".lstrip("/")) in beside:
                repository.get(sibling)
    return path.parent if path.name == CONVERTED else path
