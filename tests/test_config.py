"""Configurations: every file in configs/ loads, says how it is run, and asks for what there is; the demo's files."""

import importlib.util
import os
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from turbojax import UserError
from turbojax.app.generate import read_settings
from turbojax.config import SETTINGS, base_config, changed, describe_settings, load_config, parse_value
from turbojax.media.video import check_path, video_size
from turbojax.models.published import MODELS
from turbojax.models.vae import VAEConfig
from turbojax.pipeline.request import latent_shape, make_sampler
from turbojax.shapes import demo
from turbojax.train.config import TRAIN_SETTINGS, check_settings, make_recipe

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
TEXT = FILES[0].with_name("shapes_text.py")  # has settings of its own
TRAINING = [file for file in FILES if file.stem.startswith(("train_", "shapes_")) and file != TEXT]
files = pytest.mark.parametrize(
    "file", [file for file in FILES if file not in (*TRAINING, TEXT)], ids=lambda file: file.stem
)


def module(file: Path):
    spec = importlib.util.spec_from_file_location(f"configs_{file.stem}", file)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_configurations_are_there():
    names = {"demo", "wan1_3b", "wan1_3b_quant", "wan14b", "wan14b_quant", "wan14b_480p_quant"}
    names |= {"demo_i2v", "wan22_i2v", "wan22_i2v_quant", "wan21_i2v_480p_quant"}
    names |= {f"shapes_{name}" for name in ("text", "vae", "teacher", "sla", "rcm")}
    names |= {"train_teacher", "train_sla", "train_rcm", "train_toy"}
    assert {file.stem for file in FILES} >= names


@files
def test_docstring_is_the_command(file):
    text = module(file).__doc__
    assert f"\n    python scripts/generate.py --config=configs/{file.name}" in text
    weights = module(file).get_config().weights
    if not weights.startswith("demo"):
        assert f"huggingface.co/{weights}" in text
    if weights.startswith("TurboDiffusion/"):
        assert re.search(r"\bTurboWan[\w.-]+\.pth\b", text)
        assert "huggingface.co/Wan-AI/Wan2.1-T2V-1.3B" in text.replace("\n", " ")
        assert ("quant" in file.stem) == ("-quant.pth" in text)


def test_variant_states_what_it_changes():
    int8, base = load_config("wan14b_480p_quant"), load_config("wan14b")
    assert int8.is_locked
    assert int8.get_type("height") is int  # may be set on the command line
    assert {name: value for name, value in int8.items() if value != base[name]} == {
        "weights": "TurboDiffusion/TurboWan2.1-T2V-14B-480P",
        "resolution": "480p",
        "quant_linear": True,
    }


@files
def test_settings_can_be(file):
    config = module(file).get_config()
    assert isinstance(config, ConfigDict)
    assert set(config) == {setting.name for setting in SETTINGS}
    width, height = video_size(config.resolution, config.aspect_ratio)
    latent_shape(VAEConfig.wan2_1(), config.num_frames, config.height or height, config.width or width)
    sigma_max = 80.0 if config.sigma_max is None else config.sigma_max
    make_sampler(config.sampler, num_steps=config.num_inference_steps, sigma_max=sigma_max, ode=config.ode)
    check_path(config.output)
    assert config.model in MODELS
    assert config.dtype in ("bfloat16", "float32")
    assert bool(config.quant_linear) == ("quant" in file.stem)


@pytest.mark.parametrize("file", TRAINING, ids=lambda file: file.stem)
def test_training_settings_can_be(file):
    loaded = module(file)
    assert f"\n    python scripts/train.py --config=configs/{file.name}" in loaded.__doc__
    config = loaded.get_config()
    assert set(config) == {setting.name for setting in TRAIN_SETTINGS}
    if config.data is None:
        with pytest.raises(UserError, match=r"no data; give --config\.data="):
            check_settings(config, drawn=["shapes"])
        config.data = "shards"
    check_settings(config, drawn=["shapes"])
    make_recipe(config)


@pytest.mark.parametrize("file", [f for f in (*TRAINING, TEXT) if "shapes" in f.stem], ids=lambda file: file.stem)
def test_small_model_s_sizes(file):
    loaded = module(file)
    assert "python scripts/train" in loaded.__doc__
    full, tiny = loaded.get_config(), loaded.get_config("tiny")
    assert (full.model, tiny.model) == ("shapes", "shapes-tiny")
    assert full.workdir == tiny.workdir == f"outputs/shapes/{file.stem.removeprefix('shapes_')}"
    if file != TEXT:
        check_settings(tiny, drawn=["shapes"])
    with pytest.raises(UserError, match="choose full or tiny"):
        loaded.get_config("small")


def test_locked_and_typed():
    config = base_config(seed=3)
    assert config.seed == 3
    for bad, error in ((lambda: config.update(hight=3), KeyError), (lambda: config.update(seed="three"), TypeError)):
        with pytest.raises(error):
            bad()
    with pytest.raises(UserError, match="there is no setting hight, perhaps height"):
        base_config(hight=3)
    with pytest.raises(UserError, match=r"there is no setting zzz$"):
        base_config(zzz=3)
    assert base_config().height is None
    config.height = 480
    assert config.height == 480


def test_every_setting_is_described():
    lines = describe_settings().splitlines()
    assert [re.match(r"  --config\.(\w+): \w", line)[1] for line in lines] == [setting.name for setting in SETTINGS]
    assert all(len(line) <= 120 for line in lines)


# The files of the demo of image to video.


def test_demo_is_written_once():
    folder = demo.demo_folder()
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert demo.demo_folder() == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times
    assert {path.name for path in folder.iterdir()} == {
        *("TurboWan-demo-high.pth", "TurboWan-demo-low.pth", "image.png"),
        *("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google"),
    }


def test_demo_is_whole_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(folder, *, image):
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "write_demo", fail)
    with pytest.raises(UserError, match="No space left on device"):
        demo.demo_folder()
    assert os.listdir(tmp_path / "turbojax") == []

    def be_second(folder, *, image):
        (tmp_path / "turbojax" / f"demo-i2v-{demo.VERSION}").mkdir()
        (tmp_path / "turbojax" / f"demo-i2v-{demo.VERSION}" / "theirs").write_text("")

    monkeypatch.setattr(demo, "write_demo", be_second)
    assert [path.name for path in demo.demo_folder().iterdir()] == ["theirs"]
    assert os.listdir(tmp_path / "turbojax") == [f"demo-i2v-{demo.VERSION}"]


HOSTILE = ["-1", "nan", "inf", "-inf", "1e400", "1" + "0" * 30, "9" * 300, "", "x", "\0"]


ZERO = ("seed", "sample_index", "boundary", "guidance_scale", "lora_strength", "ode", "quant_linear", "adaptive_size")
ZERO += ("cache_prompts",)
PATHS = ("image_encoder", "vae", "text_encoder", "tokenizer", "lora", "lora_high", "lora_low", "output")
POSSIBLE = {(name, "") for name in ("image", "last_image", "quant_scheme")} | {
    *((name, text) for name in ("sigma_max",) for text in ("1" + "0" * 30, "9" * 300)),
    ("lora_strength", "-1"),
}


@pytest.mark.parametrize("sampler", ["rcm", "euler", "unipc"])
@pytest.mark.parametrize(
    "name", [setting.name for setting in SETTINGS if setting.name not in ("prompt", "negative_prompt", "weights")]
)
def test_values_that_no_setting_can_have_are_refused_before_anything_is_loaded(name, sampler, tmp_path):
    sizes = dict(height=32, width=48, num_frames=5, num_inference_steps=4, weights="random")
    config = base_config(**sizes, sampler=sampler, output=str(tmp_path / "x.mp4"))
    for text in ["0", *HOSTILE] if name not in ZERO else HOSTILE:
        if (name, text) in POSSIBLE or name in PATHS:
            continue
        with pytest.raises(UserError) as error:
            read_settings(changed(config, **{name: parse_value(name, text)}))
        assert "\n" not in str(error.value)
        assert any(part in str(error.value) for part in (name, "num_steps=0", f"{text!r} is no path"))
        assert len(str(error.value)) < 800  # what was typed, twice at most


@pytest.mark.parametrize("name", ["guidance_scale", "shift", "num_frames", "num_samples", "fps"])
def test_the_pipelines_call_refuses_them_too(demo_pipe, name):
    for value in (float("nan"), -1, 10**30, "x", None):
        with pytest.raises(UserError, match=f"^{name} is .* and must be a"):
            demo_pipe("a cat", **{name: value})
