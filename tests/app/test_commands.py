"""The console command: what the scripts run, and a wheel that needs no file of the checkout."""

import importlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import imageio.v2 as imageio
import pytest

from tests.app.small import FLAGS
from turbojax import UserError
from turbojax.app import cli, commands
from turbojax.config import CONFIGS

pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called")

ROOT = Path(__file__).parents[2]
BUILD = "from hatchling.build import build_wheel; build_wheel('dist')"


def test_every_command_is_a_script_with_flags_of_its_own():
    assert {"generate", "convert", "benchmark", "train", "merge", "make_shards", "evaluate"} <= set(commands.NAMES)
    modules = [importlib.import_module(f"turbojax.app.commands.{name}") for name in commands.NAMES]  # in one process
    assert len({id(module.FLAGS) for module in modules}) == len(modules)
    for name, module in zip(commands.NAMES, modules, strict=True):
        script = (ROOT / "scripts" / f"{name}.py").read_text()
        assert f'    run("{name}")' in script
        assert f"    python scripts/{name}.py " in module.__doc__
        assert f"  {name} " in commands.usage()


def test_entry_point():
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["turbojax"]
    module, _, function = entry.partition(":")
    assert getattr(importlib.import_module(module), function) is commands.main


def test_help_is_that_of_the_console(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["turbojax"])
    commands.main()
    assert "turbojax COMMAND --flag=VALUE" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["turbojax", "generate", "-h"])
    with pytest.raises(SystemExit) as end:
        commands.main()
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "\n    turbojax generate --config=demo\n" in shown
    assert "scripts/" not in shown


def test_unknown_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["turbojax", "genrate"])
    with pytest.raises(SystemExit) as end:
        commands.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: there is no command genrate, perhaps generate; choose ")


def test_configurations_by_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path in ("demo", "configs/demo.py"):
        assert cli.find_config(path) == CONFIGS / "demo.py"
    for path in ("other/demo.py", "demo.py", "nothing"):
        with pytest.raises(UserError, match=rf"--config={path} is no file; give one, or a name: demo, "):
            cli.find_config(path)
    Path("configs").mkdir()
    own = Path("configs/demo.py")
    own.write_text("")
    assert cli.find_config("configs/demo.py") == own
    for given in (["--config=train_toy:sla"], ["--config", "train_toy:sla"]):
        assert cli.find_configs(given, ()) == [f"--config={CONFIGS / 'train_toy.py'}:sla"]


def test_stages_of_the_small_model_find_their_settings():
    from turbojax.app.commands.train_shapes import settings

    tiny = settings("teacher", size="tiny", steps=1.0)
    assert (tiny.model, settings("teacher", size="tiny", steps=0.5).num_steps) == ("shapes-tiny", tiny.num_steps // 2)
    assert settings("text", size="tiny", steps=1e-9).steps == 1


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built of a copy, since building leaves folders behind; unpacked."""
    source = tmp_path_factory.mktemp("source")
    for name in ("turbojax", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-c", BUILD], cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next((source / "dist").glob("*.whl"))) as archive:
        archive.extractall(source / "unpacked")
    return source / "unpacked"


def test_wheel_holds_the_package_and_the_configurations(wheel):
    def files(folder):
        kinds = (".py", ".typed", ".safetensors", ".json")
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in kinds}

    packed = {name.removeprefix("turbojax/") for name in files(wheel)}
    assert packed == files(ROOT / "turbojax") | {f"configs/{path.name}" for path in CONFIGS.glob("*.py")}
    (entry_points,) = wheel.glob("*.dist-info/entry_points.txt")
    assert "turbojax = turbojax.app.commands:main" in entry_points.read_text()


def test_video_without_the_checkout(wheel, tmp_path):
    command = [sys.executable, "-m", "turbojax", "generate", "--config=demo", *FLAGS]
    environment = os.environ | {"PYTHONPATH": str(wheel)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(imageio.mimread(tmp_path / "outputs" / "demo.mp4")) == 5


def test_variant_without_the_checkout(wheel, tmp_path):
    code = "from turbojax.config import *; print(load_config('wan14b_quant').quant_linear, CONFIGS)"
    environment = os.environ | {"PYTHONPATH": str(wheel)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["True", str(wheel / "turbojax" / "configs")], done.stderr
