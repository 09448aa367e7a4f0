"""What the evaluation measures: prompts, noise and distances between videos."""

import numpy as np
import pytest

from turbojax.errors import UserError
from turbojax.shapes.scene import held_out, parse
from turbojax.shapes_training import evaluate as evaluating

VIDEOS = np.random.default_rng(0).integers(20, 230, (2, 3, 24, 24, 3)).astype(np.uint8)


def test_prompts_are_held_out_and_the_seed_s():
    tasks = evaluating.held_out_tasks(30, seed=1)
    assert tasks == evaluating.held_out_tasks(40, seed=1)[:30]
    assert tasks != evaluating.held_out_tasks(30, seed=2)
    for task in tasks:
        assert all(held_out(thing) for thing in task.scene.things)
        assert parse(task.prompt) == task.scene


def test_noise_does_not_depend_on_batches_or_steps():
    tasks = evaluating.held_out_tasks(3, seed=0)
    first, added = evaluating.noise(tasks, (2, 4, 4, 16), 4, seed=5)
    assert first.shape == (3, 2, 4, 4, 16)
    assert added.shape == (4, 3, 2, 4, 4, 16)
    alone, fewer = evaluating.noise(tasks[1:2], (2, 4, 4, 16), 2, seed=5)
    np.testing.assert_array_equal(alone[0], first[1])
    np.testing.assert_array_equal(fewer[:, 0], added[:2, 1])


def test_distances():
    assert evaluating.psnr(VIDEOS, VIDEOS) == np.inf
    assert evaluating.psnr(VIDEOS, VIDEOS, most=99.0) == 99
    assert evaluating.ssim(VIDEOS, VIDEOS) == pytest.approx(1)
    off = VIDEOS + 10
    assert evaluating.psnr(off, VIDEOS) == pytest.approx(20 * np.log10(25.5))
    assert 0.9 < evaluating.ssim(off, VIDEOS) < 1
    noisy = np.clip(VIDEOS + np.random.default_rng(1).normal(0, 40, VIDEOS.shape), 0, 255).astype(np.uint8)
    assert evaluating.ssim(noisy, VIDEOS) < 0.9
    flat = np.full_like(VIDEOS, 128)
    assert abs(evaluating.ssim(flat, VIDEOS)) < 0.1


def test_a_variant_without_its_network_is_told(tmp_path):
    tasks = evaluating.held_out_tasks(1, seed=0)
    settings = dict(size=dict(num_frames=9, height=80, width=80), dtype=np.float32)
    for names, message in (
        (["no such"], "there is no variant 'no such'"),
        (["rcm, ode"], f"{tmp_path} lacks rcm/transformer.safetensors; "),
    ):
        with pytest.raises(UserError, match=message):
            next(evaluating.evaluate(names, tasks, tmp_path, None, **settings))


def test_contact_sheet(tmp_path):
    from turbojax.media.image import read_image

    evaluating.contact_sheet(VIDEOS, tmp_path / "sheet.png", columns=3)
    picture = read_image(tmp_path / "sheet.png")
    assert picture.shape == (48, 72, 3)
    np.testing.assert_array_equal(picture[24:, 48:], VIDEOS[1, 2])
