"""The encoding of an image and grey frames: the same as that of the whole clip, for less work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.golden_io import GOLDEN, load
from tests.parity.vae import fixture_vae
from turbojax.errors import UserError
from turbojax.models import image_condition
from turbojax.models.vae import encode

HEIGHT, WIDTH = 16, 24


@pytest.fixture(scope="module")
def vae():
    return fixture_vae(load(GOLDEN / "vae.safetensors")[1])


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(-1, 1, (2, HEIGHT, WIDTH, 3)).astype(np.float32)


@pytest.mark.parametrize(("num_frames", "ends"), [(1, False), (5, False), (137, False), (5, True), (81, True)])
def test_equals_the_whole_clip(vae, images, num_frames, ends, monkeypatch):
    last = images[1] if ends else None
    still = image_condition.encode_still(vae, images[0], num_frames=num_frames, last_image=last)
    clip = np.zeros((1, num_frames, HEIGHT, WIDTH, 3), np.float32)
    clip[0, 0] = images[0]
    if ends:
        clip[0, -1] = images[1]
    # XLA joins operations of a whole encoder otherwise than of its stages: the last bits of float32 differ.
    np.testing.assert_allclose(still, encode(vae, clip), rtol=0, atol=1e-5)
    never = [(stride, num_frames) for stride, _ in image_condition.stages_of(vae)]
    monkeypatch.setattr(image_condition, "stages_of", lambda vae: never)  # computes every frame
    np.testing.assert_array_equal(
        still, image_condition.encode_still(vae, images[0], num_frames=num_frames, last_image=last)
    )


def test_constant_frames_are_the_first_that_repeat(vae, images):
    stages = image_condition.stages_of(vae)
    assert stages == [(1, 11), (2, 11), (2, 11), (1, 29)]
    graph, state = nnx.split(vae)
    cache, frames = None, [jnp.asarray(images[:1, None]), *[jnp.zeros((1, 1, HEIGHT, WIDTH, 3))] * 128]
    for stage, (stride, constant) in enumerate(stages):
        groups = [frames[:1], *(frames[i : i + stride] for i in range(1, len(frames), stride))]
        frames = []
        for i, group in enumerate(groups):
            frame, cache = image_condition.encode_stage(graph, state, group, cache, first=i == 0, stage=stage)
            frames.append(frame)
        np.testing.assert_array_equal(frames[constant + 1], frames[constant])
        assert stage == 3 or not np.array_equal(frames[constant - 1], frames[constant])


def test_mask(vae, images):
    y = image_condition.condition(vae, images[0], num_frames=9)
    assert y.shape == (1, 3, HEIGHT // 8, WIDTH // 8, 20)
    assert y.dtype == jnp.float32
    assert (np.asarray(y[0, 0, ..., :4]) == 1).all()
    assert (np.asarray(y[0, 1:, ..., :4]) == 0).all()
    y = image_condition.condition(vae, images[0], num_frames=9, last_image=images[1])
    assert (np.asarray(y[0, 2, ..., :4]) == [0, 0, 0, 1]).all()


def test_errors(vae, images):
    with pytest.raises(UserError, match="frames=8"):
        image_condition.encode_still(vae, images[0], num_frames=8)
    with pytest.raises(UserError, match="height=12"):
        image_condition.encode_still(vae, images[0, :12], num_frames=9)
    for frames, last in ((1, images[1]), (9, images[1, :8])):
        with pytest.raises(UserError, match="last image"):
            image_condition.encode_still(vae, images[0], num_frames=frames, last_image=last)


def test_compiled_ahead(vae, images):
    """What `compile_still` compiled is found again: XLA has nothing more to do for the stages."""
    image_condition.compile_still(vae, 16, 16)
    compiled: list[str] = []

    def listen(event: str, duration: float, **details) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(details.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    image_condition.encode_still(vae, images[0, :, :16], num_frames=9)
    assert not [name for name in compiled if "encode_stage" in name]
    image_condition.encode_still(vae, images[0, :, :8], num_frames=9)
    assert [name for name in compiled if "encode_stage" in name]
