"""Every example of examples/ runs, at a small size, and writes what it says."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZE = {"height": 32, "width": 48, "num_frames": 5}
WRITTEN = {
    "text_to_video": ["text_0.mp4", "text_1.mp4"],
    "image_to_video": ["image.mp4", "image_continued.mp4"],
    "lora": ["style.safetensors", "lora_0.1.mp4", "lora_0.5.mp4"],
    "own_sampler": ["fresh_0.0.mp4", "fresh_0.5.mp4", "fresh_1.0.mp4"],
    "ablation": ["ablation/index.html", "ablation/results.csv"],
    "fine_tuning": ["teacher/transformer.safetensors", "sla/transformer.safetensors"],
}


def test_every_example_is_here():
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(WRITTEN)


@pytest.mark.parametrize("name", WRITTEN)
def test_example(name, tmp_path, capsys):
    main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    size = {"num_steps": 2} if name == "fine_tuning" else SIZE
    main(folder=str(tmp_path), **size)
    assert not [written for written in WRITTEN[name] if not (tmp_path / written).stat().st_size]
    assert capsys.readouterr().out
