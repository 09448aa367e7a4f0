"""~ in every path of every command and of the calls in Python: the home folder, and never a folder of that name."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.weights.checkpoints import save, small, turbo
from turbojax import UserError, config
from turbojax.app import commands
from turbojax.app.generate import loras
from turbojax.app.session import batch
from turbojax.config import base_config
from turbojax.errors import CheckpointError
from turbojax.media.image import read_image
from turbojax.media.video import read_video, save_video
from turbojax.models.tokenizer import Tokenizer
from turbojax.models.wan import WanConfig
from turbojax.train.config import TRAIN_SETTINGS
from turbojax.train.data import open_shards
from turbojax.train.make_shards import find_clips
from turbojax.weights.convert import convert
from turbojax.weights.files import find_components
from turbojax.weights.io import read_tensors, write_pth
from turbojax.weights.load import load_wan
from turbojax.weights.lora import read_lora
from turbojax.weights.merge import merge
from turbojax.weights.orbax import load_orbax, save_orbax

ROOT = Path(__file__).parents[2]
# ~/cut.* are damaged, ~/file is a file and no folder, ~/no is not there: what is refused is named by its whole path.
DEMO, TOY = ["--config=demo"], ["--config=train_toy", "--config.workdir=~/run"]
SHARDS = ["--videos=~/clips", "--output=~/data", "--weights=demo", "--num_frames=5"]
MERGE = [f"--{name}=~/whole.pth" for name in ("base", "diff_base", "diff_target")] + ["--output=~/x.safetensors"]
COMMANDS: dict[str, dict[str, list[str]]] = {
    "ablate": {"out": [*DEMO, "--grid=sla_topk=0.1,0.2", "--out=~/file/x"]},
    "benchmark": {"out": ["--out=~/file/x.json"]},
    "convert": {
        "input": ["--input=~/cut.pth", "--output=~/x.safetensors"],
        "output": ["--input=~/whole.pth", "--output=~/file/x.safetensors"],
    },
    "evaluate": {
        "folder": ["--folder=~/no"],
        "teacher": ["--teacher=~/file/x.safetensors"],
        "output": ["--output=~/file/x.json"],
        "sheets": ["--output=~/x.json", "--sheets=~/file/x"],
    },
    "generate": {
        "config": ["--config=~/own.py"],
        "prompts_file": [*DEMO, "--prompts_file=~/no"],
        "image": [*DEMO, "--config.image=~/cut.png"],
        "last_image": [*DEMO, "--config.image=~/picture.png", "--config.last_image=~/cut.png"],
        "output": [*DEMO, "--config.output=~/file/x.mp4"],
        **{name: [*DEMO, f"--config.{name}=~/cut.pth"] for name in ("weights", "vae", "text_encoder")},
        "tokenizer": [*DEMO, "--config.tokenizer=~/cut.json"],
        "lora": [*DEMO, "--config.lora=~/cut.safetensors"],
    },
    "make_shards": {
        "videos": [*SHARDS, "--videos=~/no"],
        "captions": [*SHARDS, "--captions=~/no.jsonl"],
        "output": [*SHARDS, "--output=~/file/x"],
        "weights": [*SHARDS, "--weights=~/model"],
        "vae": [*SHARDS, "--vae=~/cut.pth"],
        "text_encoder": [*SHARDS, "--text_encoder=~/cut.pth"],
        "tokenizer": [*SHARDS, "--tokenizer=~/cut.json"],
    },
    "merge": {
        **{name: [*MERGE, f"--{name}=~/cut.pth"] for name in ("base", "diff_base", "diff_target")},
        "output": [*MERGE, "--output=~/file/x.safetensors"],
    },
    "serve": {"out": [*DEMO, "--out=~/file/x"]},
    "train": {
        "workdir": [*TOY, "--config.workdir=~/file/x"],
        "data": [*TOY, "--config.data=~/no"],
        "weights": [*TOY, "--config.weights=~/cut.pth"],
        "teacher": [*TOY, "--config.recipe=sla", "--config.attention_type=sla", "--config.teacher=~/cut.pth"],
    },
    "train_shapes": {"folder": ["--folder=~/file"]},
}
# Read by the same functions as others above, which test_calls_in_python tries.
ELSEWHERE = {"image_encoder", "lora_high", "lora_low", "ablate config", "serve config", "train config"}
ELSEWHERE |= {"train vae", "train text_encoder", "train tokenizer"}
NO_PATHS = {
    *("prompt", "negative_prompt", "background", "resolution", "aspect_ratio", "sampler", "model", "quant_scheme"),
    *("attention_type", "sage_values", "dtype", "memory", "vae_tiling", "recipe", "optimizer", "tangent", "simulation"),
    *("sample_prompts", "grid", "reference", "variants", "host", "user", "stages", "shipped"),
}
CASES = [(command, name) for command, names in COMMANDS.items() for name in names]


def test_every_text_of_every_command_is_tried():
    """A new flag or setting is a path, which belongs in the table above, or none."""
    found = {("generate", setting.name) for setting in config.SETTINGS if setting.default is str}
    found |= {("generate", setting.name) for setting in config.SETTINGS if isinstance(setting.default, str)}
    found |= {("train", s.name) for s in TRAIN_SETTINGS if s.default is str or isinstance(s.default, str)}
    for command in commands.NAMES:
        own = importlib.import_module(f"turbojax.app.commands.{command}").FLAGS
        kinds = {name: own[name].flag_type() for name in own}
        texts = [
            name for name, kind in kinds.items() if kind == "config object" or ("string" in kind and "enum" not in kind)
        ]
        found |= {(command, name) for name in texts}
    known = {*NO_PATHS, *ELSEWHERE}
    assert sorted(pair for pair in found if pair[1] not in known and " ".join(pair) not in known) == sorted(
        pair for pair in CASES if pair in found
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    whole = save(home / "whole.pth", turbo(small()))
    for name in ("cut.pth", "cut.safetensors", "cut.json", "cut.png"):
        (home / name).write_bytes(whole.read_bytes()[:-500])
    (home / "file").write_text("")
    (home / "own.py").write_text(
        "from turbojax.config import base_config\n\n\ndef get_config():\n"
        "    return base_config(weights='demo', output='~/file/x.mp4')\n"
    )
    (home / "model").mkdir()
    for name in ("vae.safetensors", "text_encoder.safetensors", "tokenizer.json"):
        shutil.copy(home / "cut.pth", home / "model" / name)
    (home / "clips").mkdir()
    (home / "clips" / "a.mp4").write_bytes(b"")
    (home / "clips" / "a.txt").write_text("a bird")
    Image.new("RGB", (32, 32)).save(home / "picture.png")
    return home


@pytest.fixture(scope="module")
def outcomes(home, tmp_path_factory) -> dict[tuple[str, str], tuple[int, str, str]]:
    """Exit code, stdout and stderr of each command line, run in a folder that must stay empty."""
    cwd = tmp_path_factory.mktemp("cwd")
    lines = [[str(ROOT / "scripts" / f"{command}.py"), *COMMANDS[command][name]] for command, name in CASES]
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(home / "cache")}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.many_runs",
            "turbojax.shapes_training.registry",
            "turbojax.shapes_training.evaluate",
        ],
        input=json.dumps(lines),
        stdout=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment,
        check=True,
    )
    assert os.listdir(cwd) == []
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(("command", "name"), CASES)
def test_home_in_commands(outcomes, home, command, name):
    code, _, stderr = outcomes[command, name]
    assert code == 2, stderr
    assert "Traceback" not in stderr
    assert f"{home}/" in stderr.splitlines()[-1] or command == "train_shapes"
    assert "~" not in stderr


def test_calls_in_python(home, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    settings = base_config(lora="~/cut.pth", lora_high="~/cut.pth", lora_low="~/cut.pth")
    assert len(loras(settings)) == 3
    for lora in loras(settings):
        with pytest.raises(CheckpointError, match=f"{home}/cut.pth"):
            read_lora(lora, WanConfig.t2v_1_3b())
    given = dict.fromkeys(("vae", "text_encoder", "tokenizer", "image_encoder"), "~/cut.pth")
    assert set(find_components(None, given).values()) == {home / "cut.pth"}
    for call in (
        lambda: read_tensors("~/no.pth"),
        lambda: load_wan("~/no.pth"),
        lambda: read_image("~/no.png"),
        lambda: read_video("~/no.mp4", num_frames=1, height=16, width=16),
        lambda: Tokenizer.from_path("~/no.json"),
        lambda: find_clips("~/no.d"),
        lambda: open_shards("~/no.d"),
        lambda: batch(base_config(weights="demo", output="~/videos/x.png"), "~/no.txt"),
        lambda: save_orbax("~/whole.pth", {}),
        lambda: load_orbax("~/no.d", {}),
        lambda: merge(*["~/no.pth"] * 3, "~/x.pth", format="pth"),
    ):
        with pytest.raises(UserError, match=f"{home}/(no|whole)"):
            call()
    assert save_video(np.zeros((1, 16, 16, 3), np.uint8), "~/videos/x.png") == [home / "videos" / "x.png"]
    write_pth("~/written/x.pth", [("a", np.zeros(2, np.float32))])
    convert("~/whole.pth", "~/written/y.safetensors")
    assert sorted(os.listdir(home / "written")) == ["x.pth", "y.safetensors"]
    assert os.listdir(tmp_path) == []
