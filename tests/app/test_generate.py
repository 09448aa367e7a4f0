"""The scripts as a user runs them: files that can be read back, help, and one sentence for each mistake."""

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import imageio.v2 as imageio
import jax
import numpy as np
import pytest
from flax import nnx

from tests.app.small import FLAGS, SMALL
from tests.weights.checkpoints import save, small, turbo
from turbojax.app import generate
from turbojax.config import SETTINGS, base_config
from turbojax.shapes.demo import demo_picture
from turbojax.weights.load import load_wan
from turbojax.weights.lora import LoRA

# Reading an mp4 starts ffmpeg, by fork and exec at once; JAX warns of forks that go on.
pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called")

ROOT = Path(__file__).parents[2]
GENERATE, CONVERT, ABLATE = (str(ROOT / "scripts" / f"{name}.py") for name in ("generate", "convert", "ablate"))
DEMO = f"--config={ROOT / 'configs' / 'demo.py'}"


def run_all(cases: dict[str, list[str]], folder: Path) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr of every command line."""
    command = [sys.executable, "-m", "tests.many_runs"]
    commands = json.dumps([[str(part).replace("FOLDER", str(folder)) for part in case] for case in cases.values()])
    done = subprocess.run(command, input=commands, capture_output=True, text=True, cwd=ROOT, check=True)
    return dict(zip(cases, map(tuple, json.loads(done.stdout)), strict=True))


class Malice:
    """Pickled as a call that leaves a file behind."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files to make mistakes with."""
    folder = tmp_path_factory.mktemp("mistakes")
    whole = save(folder / "whole.pth", turbo(small()))
    (folder / "html.pth").write_text("<!DOCTYPE html><html><body>401 Unauthorized</body></html>")
    (folder / "cut.pth").write_bytes(whole.read_bytes()[:-500])
    (folder / "empty.pth").write_bytes(b"")
    with zipfile.ZipFile(folder / "malicious.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weight": Malice(folder / "trace")}, protocol=2))
    save(folder / "other.pth", {"decoder.weight": np.zeros(3, np.float32)})
    nan = turbo(small())
    nan["head.head.bias"][:] = np.nan
    save(folder / "nan.pth", nan)
    raising = (
        "import jax\nfrom turbojax.app import cli\n\n\ndef main():\n    raise {}\n\n\ncli.run(main, help_text='')\n"
    )
    for name, text in {
        "device": raising.format("jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes')"),
        "host": raising.format("MemoryError"),
        "bug": raising.format("jax.errors.JaxRuntimeError('INTERNAL: surprise')"),
        "syntax": "def get_config(:\n",
        "without": "x = 1\n",
        "import": "import nothing_of_this_name\n",
        "zero": "def get_config():\n    return 1 / 0\n",
        "unknown": "from turbojax.config import base_config\n\n\ndef get_config():\n    return base_config(hight=3)\n",
        "plain": "def get_config():\n    return {'prompt': 'a bird'}\n",
        "value": "def get_config():\n    raise ValueError('no')\n",
        "reads": "def get_config():\n    return open('nothing')\n",
        "none": "def get_config():\n    return None\n",
    }.items():
        (folder / f"{name}.py").write_text(text)
    return folder


WITH_DEMO = [GENERATE, DEMO]
GENERATE_MISTAKES: dict[str, tuple[list[str], str]] = {
    "no config": ([GENERATE], "no settings; give --config=configs/NAME.py"),
    "missing config": ([GENERATE, "--config=configs/nothing.py"], "--config=configs/nothing.py is no file"),
    "empty config": ([GENERATE, "--config"], "--config"),
    "config with a syntax error": ([GENERATE, "--config=FOLDER/syntax.py"], "SyntaxError: invalid syntax"),
    "config without get_config": ([GENERATE, "--config=FOLDER/without.py"], "no attribute 'get_config'"),
    "config that imports nothing": ([GENERATE, "--config=FOLDER/import.py"], "No module named 'nothing_of_this_name'"),
    "config that raises": ([GENERATE, "--config=FOLDER/zero.py"], "ZeroDivisionError: division by zero"),
    "config that raises ValueError": ([GENERATE, "--config=FOLDER/value.py"], "read, ValueError: no; see --help"),
    "config that reads nothing": ([GENERATE, "--config=FOLDER/reads.py"], "No such file or directory: 'nothing'"),
    "config with an unknown name": (
        [GENERATE, "--config=FOLDER/unknown.py"],
        "there is no setting hight, perhaps height",
    ),
    "config of another kind": ([GENERATE, "--config=FOLDER/plain.py"], "get_config() must return"),
    "config that is None": ([GENERATE, "--config=FOLDER/none.py"], "the settings cannot be read"),
    "unknown setting": ([*WITH_DEMO, "--config.foo=1"], "there is no setting foo; see --help"),
    "misspelt setting": ([*WITH_DEMO, "--config.promt=x"], "there is no setting promt, perhaps prompt; see --help"),
    "unknown flag": ([*WITH_DEMO, "--sede=1"], "Unknown command line flag 'sede'"),
    "seed not a number": ([*WITH_DEMO, "--config.seed=abc"], "--config.seed=abc"),
    "switch not a switch": ([*WITH_DEMO, "--config.ode=maybe"], "--config.ode=maybe"),
    "height": ([*WITH_DEMO, "--config.height=100"], "height=100 must be a multiple of 16; nearest: 96, 112"),
    "frames": ([*WITH_DEMO, "--config.num_frames=6"], "num_frames=6 must be 1 + a multiple of 4"),
    "steps": ([*WITH_DEMO, "--config.num_inference_steps=9"], "num_steps=9"),
    "sampler": ([*WITH_DEMO, "--config.sampler=ddim"], "sampler='ddim' is unknown"),
    "frame rate": ([*WITH_DEMO, "--config.fps=0"], "fps=0 must be positive"),
    "resolution": ([*WITH_DEMO, "--config.resolution=1080p"], "resolution='1080p' is unknown; choose 480p or 720p"),
    "aspect ratio": ([*WITH_DEMO, "--config.aspect_ratio=2:1"], "aspect_ratio='2:1' is unknown"),
    "no image": ([*WITH_DEMO, "--config.image=FOLDER/html.pth"], "html.pth' is no image that can be read"),
    "missing image": ([*WITH_DEMO, "--config.image=nothing.png"], "the image 'nothing.png' does not exist"),
    "last image alone": ([*WITH_DEMO, "--config.last_image=x.png"], "last_image needs an image to start from"),
    "background": ([*WITH_DEMO, "--config.image=demo", "--config.background=x"], "background='x' is no colour"),
    "format": ([*WITH_DEMO, "--config.output=x.avi"], "has no video format; end it in .mp4, .gif, .png"),
    "output in a file": ([*WITH_DEMO, "--config.output=FOLDER/cut.pth/x.mp4"], "cannot be written"),
    "output is a folder": ([*WITH_DEMO, "--config.output=FOLDER"], "has no video format"),
    "dtype": ([*WITH_DEMO, "--config.dtype=float8"], "dtype='float8' is unknown"),
    "stray argument": ([*WITH_DEMO, "prompt=x"], "unexpected argument 'prompt=x'"),
    "no weights": ([*WITH_DEMO, "--config.weights="], "no weights; give --config.weights="),
    "missing weights": ([*WITH_DEMO, "--config.weights=FOLDER/nothing.pth"], "is neither a file, a folder nor"),
    "missing weights, relative": ([*WITH_DEMO, "--config.weights=models/x.pth"], "'models/x.pth' is neither a file"),
    "a repository, offline": ([*WITH_DEMO, "--config.weights=TurboDiffusion/x"], "could not be downloaded"),
    "too little memory on the device": (
        ["FOLDER/device.py"],
        "memory is not enough for this; set memory=stream, quant_linear=True",
    ),
    "too little memory on the host": (
        ["FOLDER/host.py"],
        "memory is not enough for this; set memory=stream, quant_linear=True",
    ),
    "unknown model": ([*WITH_DEMO, "--config.weights=random", "--config.model=wan9"], "model='wan9' is unknown"),
    "attention type": ([*WITH_DEMO, "--config.attention_type=flash"], "attention_type='flash' is unknown"),
    "memory": ([*WITH_DEMO, "--config.memory=much"], "memory='much' is unknown; choose auto, resident, stream or"),
    "a card too small": ([*WITH_DEMO, "--config.memory=0.01"], "GB that can be planned with of the GPU's 0.01; set"),
    "plan of unknown weights": (
        [*WITH_DEMO, "--plan", "--config.weights=x.pth"],
        "'x.pth' is neither a file, a folder",
    ),
    "two ways at once": ([*WITH_DEMO, "--plan", "--interactive"], "--plan, --interactive and --prompts_file exclude"),
    "missing prompts": ([*WITH_DEMO, "--prompts_file=nothing.txt"], "nothing.txt does not exist"),
    "no prompts": ([*WITH_DEMO, "--prompts_file=FOLDER/empty.pth"], "empty.pth' has no prompt"),
    "ablate without a grid": ([ABLATE, DEMO], "no grid; give for instance --grid sla_topk=0.05"),
    "ablate what is no setting": ([ABLATE, DEMO, "--grid", "seed=1,2", "sla_topc=1"], "perhaps sla_topk"),
    "ablate what cannot be": ([ABLATE, DEMO, "--grid", "sigma_max=80,1", "--out=FOLDER/out"], "sigma_max=1.0 must be"),
    "ablate with two references": ([ABLATE, DEMO, "--grid=ode=on", "--reference=seed=1,2"], "has 2 values of seed"),
    "evaluate's seed": ([str(ROOT / "scripts" / "evaluate.py"), "--seed=-1"], "seed=-1 must be in 0.."),
    "prompt's seed": ([*WITH_DEMO, "--config.seed=-1"], "seed=-1 must be in 0..18446744073709551615"),
}
WEIGHTS_MISTAKES = {
    "html": "html.pth looks like an HTML page, not a checkpoint",
    "cut": "cut.pth is damaged or cut off",
    "empty": "empty.pth is empty",
    "malicious": "malicious.pth asks to run",
    "other": "other.pth",
    "nan": "nan.pth holds NaN or infinity in head.proj.bias",
    "nothing": "nothing.pth",
}
OUT = "--output=FOLDER/out.safetensors"
CONVERT_MISTAKES: dict[str, tuple[list[str], str]] = {
    "convert nothing": ([CONVERT], "give --input=CHECKPOINT and --output=FILE, see --help"),
    "convert to nothing": ([CONVERT, "--input=FOLDER/whole.pth"], "give --input=CHECKPOINT and --output=FILE"),
    "convert, unknown flag": ([CONVERT, "--inptu=x"], "Unknown command line flag 'inptu'"),
    "convert, unknown dtype": ([CONVERT, "--dtype=int4"], "--dtype=int4"),
    "convert, unknown format": ([CONVERT, "--format=gguf"], "--format=gguf"),
    "convert, stray argument": ([CONVERT, "FOLDER/whole.pth"], "unexpected argument"),
    "convert, wrong ending": ([CONVERT, "--input=FOLDER/whole.pth", "--output=FOLDER/x.bin"], "ends in .safetensors"),
    "convert, output there": ([CONVERT, "--input=FOLDER/whole.pth", "--output=FOLDER/cut.pth"], "already exists"),
    "convert to a file's folder": ([CONVERT, "--input=FOLDER/whole.pth", "--output=FOLDER/cut.pth/x.safetensors"], ""),
    **{
        f"convert {name}.pth": ([CONVERT, f"--input=FOLDER/{name}.pth", OUT], message)
        for name, message in WEIGHTS_MISTAKES.items()
        if name != "nan"
    },
}
MISTAKES = (
    GENERATE_MISTAKES
    | {
        f"weights {name}.pth": (
            [
                *(*WITH_DEMO, f"--config.weights=FOLDER/{name}.pth", "--config.vae=DEMO"),
                *("--config.text_encoder=DEMO", "--config.tokenizer=DEMO"),
            ],
            message,
        )
        for name, message in WEIGHTS_MISTAKES.items()
    }
    | CONVERT_MISTAKES
)


PLANS: dict[str, tuple[list[str], str]] = {  # of nothing that is here, of generated weights, of files
    "repository": ([f"--config={ROOT / 'configs' / 'wan1_3b.py'}", "--config.memory=12"], "The text encoder stays in"),
    "random": ([DEMO, "--config.weights=random", "--config.model=wan2.1-t2v-14b"], "Everything stays on the GPU."),
    "files": ([DEMO], "Everything stays on the GPU."),
}


@pytest.fixture(scope="module")
def outcomes(folder, demo):
    cases = {name: [part.replace("DEMO", str(demo)) for part in command] for name, (command, _) in MISTAKES.items()}
    helps = {
        f"{Path(script).stem} {flag}": [script, flag] for script in (GENERATE, CONVERT) for flag in ("--help", "-h")
    }
    plans = {f"plan, {name}": [GENERATE, "--plan", *arguments] for name, (arguments, _) in PLANS.items()}
    return run_all(cases | helps | plans | {"bug": ["FOLDER/bug.py"]}, folder)


@pytest.mark.parametrize("name", MISTAKES)
def test_one_sentence_for_each_mistake(outcomes, folder, name):
    code, stdout, stderr = outcomes[name]
    assert code == 2, stderr
    assert "Traceback" not in stderr
    *before, last = stderr.splitlines()
    assert last.startswith("error: ")
    assert not [line for line in before if line.startswith("error: ")]
    assert all(line[0] in "IW" for line in before), stderr  # log lines
    assert len(last) < 600
    assert MISTAKES[name][1] in last
    assert not stdout


def test_mistakes_leave_nothing_behind(outcomes, folder):
    assert not (folder / "trace").exists()
    assert not list(folder.glob("*part*")) + list(folder.glob("out*"))


def test_a_bug_keeps_its_traceback(outcomes):
    code, _, stderr = outcomes["bug"]
    assert code == 1
    assert "Traceback" in stderr
    assert "INTERNAL: surprise" in stderr


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(outcomes, flag):
    code, stdout, stderr = outcomes[f"generate {flag}"]
    assert (code, stderr) == (0, "")
    assert "python scripts/generate.py --config=configs/demo.py" in stdout
    for setting in SETTINGS:
        assert f"--config.{setting.name}: {setting.meaning}" in stdout
    code, stdout, stderr = outcomes[f"convert {flag}"]
    assert (code, stderr) == (0, "")
    for name in ("input", "output", "quantize", "dtype", "format", "overwrite"):
        assert f"--{name}" in stdout


@pytest.mark.parametrize("name", PLANS)
def test_plan(outcomes, name):
    """A table and a sentence for each measure; nothing is loaded."""
    code, stdout, stderr = outcomes[f"plan, {name}"]
    assert code == 0, stderr
    assert all(line[0] in "IW" for line in stderr.splitlines()), stderr
    lines = stdout.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["GB", "load", "text", "diffusion", "vae"]
    assert lines[5].startswith("The GPU's memory: ")
    assert lines[6].startswith(PLANS[name][1])
    assert len(lines) == 7


def test_first_command_of_the_readme(tmp_path):
    """From nothing to an mp4, at a small size."""
    output = tmp_path / "new" / "demo.mp4"
    command = [sys.executable, GENERATE, DEMO, *FLAGS, f"--config.output={output}", "--config.prompt=A cat, in the sea"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"Wrote {output}" in done.stderr.splitlines()[-1]
    assert "A cat, in the sea" in done.stderr
    frames = imageio.mimread(output)
    assert len(frames) == 5
    assert frames[0].shape == (32, 48, 3)
    assert [path.name for path in output.parent.iterdir()] == ["demo.mp4"]


def test_converted_files_load_by_their_folder(tmp_path, demo, demo_pipe):
    names = {
        "TurboWan-demo.pth": "transformer",
        "Wan2.1_VAE.pth": "vae",
        "models_t5_umt5-xxl-enc-bf16.pth": "text_encoder",
    }
    commands = {
        name: [CONVERT, f"--input={demo / file}", f"--output=FOLDER/model/{name}.safetensors", "--dtype=float32"]
        for file, name in names.items()
    }
    for code, _, stderr in run_all(commands, tmp_path).values():
        assert code == 0, stderr
        assert "Wrote " in stderr.splitlines()[-1]
    assert load_wan(tmp_path / "model" / "transformer.safetensors").config.num_layers == 2
    config = small_config(tmp_path / "x.mp4", weights=str(tmp_path / "model"), tokenizer=str(demo))
    pipe = generate.load_pipeline(generate.load_options(config))
    for ours, theirs in (
        *((pipe.transformer, demo_pipe.transformer), (pipe.vae, demo_pipe.vae)),
        (pipe.text.encoder, demo_pipe.text.encoder),
    ):
        jax.tree.map(np.testing.assert_array_equal, nnx.state(ours), nnx.state(theirs))
    np.testing.assert_array_equal(pipe.text.table, demo_pipe.text.table.astype(np.float32))


# Its parts in this process.


def small_config(output: Path, **changes):
    return base_config(**(SMALL | {"num_inference_steps": 2, "output": str(output)} | changes))


@pytest.mark.parametrize(
    ("output", "samples", "expected"),
    [
        ("x.mp4", 1, ["x.mp4"]),
        ("x.gif", 2, ["x_0000.gif", "x_0001.gif"]),
        ("x.png", 1, [f"x_{i:04}.png" for i in range(5)]),
        ("x.PNG", 2, [f"x_{s:04}_{i:04}.PNG" for s in range(2) for i in range(5)]),
    ],
)
def test_outputs(demo_pipe, monkeypatch, tmp_path, output, samples, expected):
    monkeypatch.setattr(generate, "load_pipeline", lambda options, prepare: demo_pipe)
    written = generate.generate(small_config(tmp_path / "deep" / output, num_samples=samples))
    assert [path.name for path in written] == expected
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == sorted(expected)
    first = imageio.mimread(written[0]) if output.lower().endswith(("mp4", "gif")) else [imageio.imread(written[0])] * 5
    assert (len(first), first[0].shape[:2]) == (5, (32, 48))


def test_settings_reach_the_pipeline(monkeypatch, tmp_path):
    calls = {}

    class Recorder:
        def generate(self, request, *, progress):
            calls.update(vars(request))
            raise StopIteration

    monkeypatch.setattr(generate, "load_pipeline", lambda options, prepare: Recorder())
    sizes = dict(height=None, width=None, resolution="720p", aspect_ratio="9:16")
    config = small_config(tmp_path / "x.mp4", image="demo", last_image="demo", seed=5, **sizes)
    with pytest.raises(StopIteration):
        generate.generate(config)
    assert (calls["width"], calls["height"], calls["seed"]) == (720, 1280, 5)
    np.testing.assert_array_equal(calls["image"], demo_picture())
    not_the_calls = {
        *("image_encoder", "lora", "lora_high", "lora_low", "lora_strength", "boundary"),
        *("resolution", "aspect_ratio", "model", "weights", "vae", "text_encoder", "tokenizer", "cache_prompts"),
        *("quant_linear", "quant_scheme", "attention_type", "sla_topk", "sage_values", "dtype", "memory"),
    }
    not_settings = {"latents", "noise", "sla_topk"}
    assert set(calls) - not_settings == {setting.name for setting in SETTINGS} - not_the_calls


def test_loras(tmp_path):
    config = small_config(tmp_path / "x.mp4", lora="a.safetensors, b.safetensors", lora_low="c", lora_strength=0.5)
    expected = [("a.safetensors", None), ("b.safetensors", None), ("c", "low")]
    assert generate.loras(config) == tuple(LoRA(path, 0.5, expert) for path, expert in expected)


@pytest.mark.parametrize(
    ("weights", "prompt", "line"),
    [
        ("demo", "a red star moving left", ""),
        ("demo", "a red cat moving left", "this small model knows circle, square, triangle, star"),
        ("TurboDiffusion/TurboWan2.1-T2V-1.3B-480P", "a red cat moving left", ""),
    ],
)
def test_what_the_small_model_does_not_know(demo_pipe, monkeypatch, tmp_path, caplog, weights, prompt, line):
    monkeypatch.setattr(generate, "load_pipeline", lambda options, prepare: demo_pipe)
    generate.generate(small_config(tmp_path / "x.mp4", weights=weights, prompt=prompt))
    warned = " ".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert (line in warned) if line else ("small model" not in warned)
