"""Grids over settings: what is made, once and no more, and what the report says of it."""

import csv
import json
import re
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest

from tests.app.small import SMALL
from turbojax import TurboVideoPipeline, UserError
from turbojax.app import cli
from turbojax.app.ablation import ablate, cells_of, parse_settings
from turbojax.config import base_config
from turbojax.media.quality import psnr

pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called")


@pytest.fixture
def config(demo_pipe):
    return base_config(**SMALL)


@pytest.fixture
def calls(monkeypatch):
    """The pipeline's calls; the one numbered `calls.stop` is the process's last."""

    class Calls(list):
        stop = -1

    calls, generate = Calls(), TurboVideoPipeline.generate

    def counted(pipe, request, **options):
        if len(calls) == calls.stop:
            raise KeyboardInterrupt
        calls.append(request)
        return generate(pipe, request, **options)

    monkeypatch.setattr(TurboVideoPipeline, "generate", counted)
    return calls


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_stopped_after_four_of_nine_cells_and_run_again(config, loads, calls, tmp_path):
    grid = {"guidance_scale": [1.5, 2.0, 3.0], "shift": [3.0, 4.0, 5.0]}
    calls.stop = 4
    with pytest.raises(KeyboardInterrupt):
        ablate(config, grid, tmp_path)
    assert len(records(tmp_path / "cells.jsonl")) == 4
    calls.stop = -1
    page = ablate(config, grid, tmp_path)
    assert len(calls) == 9
    assert len({(call.guidance_scale, call.shift) for call in calls}) == 9
    assert len(loads) == 2  # once a run
    assert len({record["key"] for record in records(tmp_path / "cells.jsonl")}) == 9

    rows = records(tmp_path / "results.jsonl")
    assert [(row["guidance_scale"], row["shift"]) for row in rows] == [
        tuple(cell.values()) for cell in cells_of(config, grid)
    ]
    assert rows[0]["psnr"] is None
    assert all(row["psnr"] == "inf" for row in rows[1:3])  # rcm takes no shift
    assert all(5 < row["psnr"] < 60 for row in rows[3:])
    with (tmp_path / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["diffusion_seconds"]) for row in table] == [row["diffusion_seconds"] for row in rows]
    assert imageio.imread(tmp_path / "plot.png").ndim == 3
    text = page.read_text()
    assert text.count("<figure>") == 9
    named = set(re.findall(r'(?:src|href)="([^"]+)"', text))
    assert len(named) == 9 * 5 + 1
    assert all((tmp_path / name).is_file() for name in named)  # relative
    assert not list(tmp_path.rglob("*part*"))

    ablate(config, grid, tmp_path)
    ablate(config, {"guidance_scale": [2.0, 4.0]}, tmp_path)  # shift is that of the configuration, 5
    assert len(calls) == 10
    assert len(loads) == 3


def test_each_video_is_compared_with_the_reference(config, loads, calls, tmp_path):
    ablate(config, {"seed": [1, 2], "guidance_scale": [2.0]}, tmp_path, reference={"guidance_scale": 1.0}, repeats=2)
    assert len(calls) == 8
    rows = records(tmp_path / "results.jsonl")
    assert [row["seed"] for row in rows] == [1, 2]
    for row in rows:
        frames = []
        for scale in (2.0, 1.0):
            (record,) = [
                record
                for record in records(tmp_path / "cells.jsonl")
                if record["cell"] == {"seed": row["seed"], "guidance_scale": scale}
            ]
            frames.append(np.stack([imageio.imread(tmp_path / name) for name in record["files"][1:]]))
        assert row["psnr"] == psnr(*frames)
        assert row["video"] == record["files"][0].replace(record["key"], Path(row["video"]).stem)


def test_networks_are_loaded_as_often_as_they_change(config, loads, calls, tmp_path):
    """The axis that needs one varies slowest, wherever it was named; a grid over topk needs sparse attention."""
    ablate(config, {"seed": [1, 2], "quant_scheme": ["channel", "block128"]}, tmp_path)
    assert [own.quant_scheme for own in loads] == ["channel", "block128"]
    assert [call.seed for call in calls] == [1, 2, 1, 2]
    with pytest.raises(UserError, match=r"sla_topk=0\.5 has no effect"):  # the stand-in has dense attention
        ablate(config, {"sla_topk": [0.5]}, tmp_path)
    assert loads[-1].attention_type == "sla"


def test_values_of_a_grid():
    assert parse_settings(["sla_topk=0.05,0.1,0.1", "prompt=a cat, red|a dog", "ode=on,off"]) == {
        "sla_topk": [0.05, 0.1],
        "prompt": ["a cat, red", "a dog"],
        "ode": [True, False],
    }
    for texts, error in (
        (["sla_topk"], "'sla_topk' is no setting with values"),
        (["sla_topk="], "'sla_topk=' is no setting with values"),
        (["sla_topk=1,x"], "sla_topk='x' is no number"),
        (["sla_topc=1"], "there is no setting sla_topc, perhaps sla_topk"),
        (["seed=1", "seed=2"], "seed cannot vary twice"),
        (["output=a,b"], "output cannot vary"),
    ):
        with pytest.raises(UserError, match=error):
            parse_settings(texts)


@pytest.mark.parametrize(
    ("grid", "options", "error"),
    [
        ({}, {}, "0 axes"),
        ({"seed": [1]}, {"repeats": 0}, "repeats=0"),
        ({"seed": [1, -1]}, {}, "seed=-1 must be in"),
        ({"seed": [1]}, {"reference": {"height": 48}}, "videos of another height have nothing to compare"),
    ],
)
def test_nothing_is_loaded_for_a_grid_that_cannot_be(config, loads, tmp_path, grid, options, error):
    with pytest.raises(UserError, match=error):
        ablate(config, grid, tmp_path, **options)
    assert not loads
    assert not list(tmp_path.iterdir())


def test_flags_of_several_words():
    given = ["ablate", "--grid", "a=1,2", "b=3", "--out=x", "--grid=c=4", "d", "--reference", "a=1"]
    expected = ["ablate", "--grid=a=1,2", "--grid=b=3", "--out=x", "--grid=c=4", "d", "--reference=a=1"]
    assert cli.one_word_each(given, ("grid", "reference")) == expected
