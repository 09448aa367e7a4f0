"""The stages of the small model, without their training."""

import json

import pytest
from ml_collections import ConfigDict

from turbojax.errors import UserError
from turbojax.shapes_training import stages
from turbojax.shapes_training.stages import ENCODER, STAGES, TOKENIZER, VAE, Job, take
from turbojax.train.metrics import CURVES, read_curves


@pytest.fixture
def job(tmp_path, monkeypatch):
    model = tmp_path / "model"
    for name in (ENCODER, TOKENIZER, VAE):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(name)
    story = {"quality": {"text": {"shape": 1}, "vae": {"psnr": 30.5}}, "curves": {"vae": [{"step": 1.0, "loss": 2.5}]}}
    (model / "training.json").write_text(json.dumps(story))
    monkeypatch.setattr(stages, "MODEL", model)
    return Job(tmp_path / "run", "full", lambda stage: ConfigDict())


def test_results_are_taken_from_the_package(job):
    for name in ("text", "vae"):
        assert not (job.folder / STAGES[name].last).exists()
        take(name, job)
        assert (job.folder / STAGES[name].last).exists()
    assert (job.folder / "text" / TOKENIZER).read_text() == TOKENIZER
    assert json.loads((job.folder / "vae" / "quality.json").read_text()) == {"psnr": 30.5}
    assert read_curves(job.folder / "vae" / CURVES) == [{"step": 1, "loss": 2.5}]
    assert not (job.folder / "text" / CURVES).exists()


def test_what_is_not_shipped_cannot_be_taken(job):
    with pytest.raises(UserError, match="does not ship what teacher made; choose among text,vae"):
        take("teacher", job)
