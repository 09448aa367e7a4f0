"""Image to video with the demo's files: two experts, their change, images of all kinds, CLIP, LoRA, and mistakes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tests.weights.checkpoints import save, small, turbo
from turbojax import TurboVideoPipeline, UserError
from turbojax.diffusion import RCM
from turbojax.media.image import resize, to_unit
from turbojax.memory.estimates import Residency
from turbojax.memory.planner import GB, USABLE_SHARE, WeightBytes
from turbojax.models.clip import CLIPConfig
from turbojax.models.image_condition import condition
from turbojax.pipeline import pipeline
from turbojax.pipeline.request import Request
from turbojax.shapes.demo import demo_configs, demo_folder, demo_picture
from turbojax.weights.layouts import clip_layout, generated, wan_layout
from turbojax.weights.load import load_wan
from turbojax.weights.lora import LoRA
from turbojax.weights.options import NetworkOptions

SIZE = dict(height=32, width=48, num_frames=5, num_inference_steps=4)
PROMPT = "a red bird in the sky"


@pytest.fixture(scope="module")
def folder(own_cache):
    return demo_folder()


@pytest.fixture(scope="module")
def pipe(folder):
    return TurboVideoPipeline.from_pretrained(folder, dtype=jnp.float32)


@pytest.fixture(scope="module")
def picture():
    return demo_picture()


@pytest.fixture
def undecoded(monkeypatch):
    """Only latents: for what the VAE's decoder has no part in."""
    monkeypatch.setattr(pipeline, "decode", lambda vae, latents, **options: iter(()))


def refused(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("ode", [False, True])
def test_equals_a_loop_over_the_steps(pipe, folder, picture, undecoded, ode):
    """The two networks called one step after the other, from the same condition and noise."""
    result = pipe(PROMPT, image=picture, adaptive_size=False, seed=5, ode=ode, **SIZE)
    y = condition(pipe.vae, to_unit(resize(picture, 48, 32)), num_frames=5)
    high, low = (
        load_wan(folder / f"TurboWan-demo-{name}.pth", NetworkOptions(dtype=jnp.float32)) for name in ("high", "low")
    )
    graph = nnx.graphdef(high)
    states = [nnx.state(network) for network in (high, high, low, low)]
    network = jax.jit(lambda state, *arguments: nnx.merge(graph, state)(*arguments[:-1], y=arguments[-1]))
    text = pipe.text([PROMPT])
    sampler = RCM(4, 200.0, ode)
    first, key = jax.random.split(jax.random.key(5))
    x = sampler.initial(jax.random.normal(first, (1, 2, 4, 6, 16)))
    t = np.asarray(sampler.times, np.float32)
    for i, state in enumerate(states):
        v = network(state, x, jnp.full(1, sampler.timesteps[i]), text, y)
        noise = jax.random.normal(jax.random.fold_in(key, i), x.shape)
        x = x - (t[i] - t[i + 1]) * v if ode else (1 - t[i + 1]) * (x - t[i] * v) + t[i + 1] * noise
    np.testing.assert_allclose(result.latents, x, rtol=0, atol=2e-4)


def test_output(pipe, picture, tmp_path):
    output = tmp_path / "video.mp4"
    result = pipe(PROMPT, image=picture, output=output, **SIZE)
    assert result.videos.shape == (1, 5, 32, 48, 3)  # 200 x 120 at the area of 48 x 32
    assert set(result.timings) == {"text", "image", "diffusion", "vae", "file", "compile"}
    assert output.is_file()


@pytest.mark.parametrize("idle_offloaded", [False, True], ids=["swap_experts", "swap_experts, idle offloaded"])
def test_swapped_experts(pipe, folder, picture, undecoded, idle_offloaded):
    """A limit that both do not fit in: the plan says so, results are the same, and the device holds one of them."""
    options = dict(image=picture, **SIZE)
    one, sizes = total(pipe, "transformer") // 2, WeightBytes(pipe.configs)
    waiting = sizes.embeddings if idle_offloaded else 0
    limit = pipe.plan(**options).peak - one - (sizes.vae if idle_offloaded else 0)
    load = functools.partial(TurboVideoPipeline.from_pretrained, folder, dtype=jnp.float32, prepare=options)
    moving = load(memory=(limit + 1) / USABLE_SHARE / GB)
    assert moving.experts.swap_experts
    assert moving.plan(**options).residency == Residency(idle_offloaded=idle_offloaded, swap_experts=True)
    assert "One of the two experts" in str(moving.plan(**options))
    assert total(moving, "transformer") == one - waiting
    for seed in (1, 2):
        ours, theirs = (p(PROMPT, seed=seed, **options) for p in (moving, pipe))
        np.testing.assert_array_equal(ours.latents, theirs.latents)
        assert "experts" in ours.timings
        assert total(moving, "transformer") == one - waiting
    vae = sizes.vae if idle_offloaded else 0
    assert total(moving, "host") == one + waiting + vae + moving.text.table.nbytes


def total(pipe: TurboVideoPipeline, name: str) -> int:
    return sum(pipe.memory_report()[name].values())


def test_experts_streamed(pipe, folder, picture, undecoded):
    options = dict(image=picture, seed=1, **SIZE)
    streamed = TurboVideoPipeline.from_pretrained(folder, dtype=jnp.float32, memory="stream")
    assert streamed.experts.streamed
    ours, theirs = (p(PROMPT, **options).latents for p in (streamed, pipe))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_image_and_boundary_matter(pipe, folder, picture, undecoded):
    result = pipe(PROMPT, image=picture, **SIZE).latents
    other = pipe(PROMPT, image=picture[:, ::-1], **SIZE).latents
    assert np.abs(result - other).max() > 0.05
    all_high = TurboVideoPipeline.from_pretrained(folder, dtype=jnp.float32, boundary=0.0)
    assert np.abs(result - all_high(PROMPT, image=picture, **SIZE).latents).max() > 0.05


def test_samples_prompts_and_guidance(pipe, picture, undecoded):
    options = dict(image=picture, **SIZE) | {"num_inference_steps": 1}
    noise = jax.random.normal(jax.random.key(0), (4, 2, 4, 6, 16))
    prompts = [PROMPT, "a blue sea"]
    both = pipe(prompts, num_samples=2, latents=noise, guidance_scale=3.0, **options).latents
    alone = pipe("a blue sea", latents=noise[3:], guidance_scale=3.0, **options).latents
    np.testing.assert_allclose(both[3:], alone, atol=2e-4)
    assert np.abs(pipe("a blue sea", latents=noise[3:], **options).latents - alone).max() > 1e-3


def test_any_image(pipe, tmp_path, undecoded):
    """A file is the upright array that it holds, and images of other kinds and sizes serve as well."""
    options = SIZE | {"adaptive_size": False, "ode": True, "num_inference_steps": 1}
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(demo_picture()).save(tmp_path / "turned.png", exif=exif)
    upright = np.rot90(demo_picture(), -1)
    result = pipe(PROMPT, image=tmp_path / "turned.png", **options).latents
    np.testing.assert_array_equal(result, pipe(PROMPT, image=upright, **options).latents)
    for image in (np.zeros((1, 1, 3), np.uint8), Image.new("CMYK", (3, 3)), np.zeros((9, 9, 4), np.uint8)):
        assert np.isfinite(pipe(PROMPT, image=image, **options).latents).all()


def test_size_of_the_image():
    picture = demo_picture()  # 200 x 120
    assert Request(image=picture).size == (816, 496)
    assert Request(image=np.rot90(picture)).size == (496, 816)
    assert Request(image=picture, adaptive_size=False).size == Request().size == (832, 480)


def test_last_image(pipe, picture, undecoded):
    once = pipe(PROMPT, image=picture, **SIZE).latents
    both = pipe(PROMPT, image=picture, last_image=picture[::-1], **SIZE).latents
    assert np.abs(once - both).max() > 0.01


def test_compiled_while_loading(folder, picture, undecoded):
    settings = dict(image=picture, **SIZE)
    prepared = TurboVideoPipeline.from_pretrained(folder, dtype=jnp.float32, prepare=settings)
    programs = len(prepared._programs)
    assert programs == 6  # two parts of the steps, noise, text, image, VAE
    prepared(PROMPT, **settings)
    assert len(prepared._programs) == programs


def test_lora_into_one_expert(pipe, folder, picture, undecoded, tmp_path):
    rng = np.random.default_rng(0)
    up, down = (rng.standard_normal(shape).astype(np.float32) for shape in ((256, 4), (4, 256)))
    name = "diffusion_model.blocks.1.cross_attn.o"
    path = save(tmp_path / "lora.safetensors", {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down})
    plain = pipe(PROMPT, image=picture, **SIZE).latents
    for expert in ("high", "low"):
        changed = TurboVideoPipeline.from_pretrained(folder, dtype=jnp.float32, loras=[LoRA(path, 0.5, expert)])
        for name in ("high", "low"):
            before, after = (p.experts.activate(name).blocks.cross_attn.o.weight[...][1] for p in (pipe, changed))
            np.testing.assert_allclose(after - before, 0.5 * up @ down if name == expert else 0 * before, atol=1e-4)
        assert np.abs(changed(PROMPT, image=picture, **SIZE).latents - plain).max() > 1e-3


# Wan 2.1: one network, with CLIP.


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    config = CLIPConfig(dim=80, mlp_dim=96, num_heads=1, num_layers=2, image_size=224, dtype=jnp.float32)
    name = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    return save(tmp_path_factory.mktemp("clip") / name, dict(generated(clip_layout(config), np.float32)))


@pytest.fixture(scope="module")
def load_clip_pipe(clip_file, folder, tmp_path_factory):
    config = small(in_channels=36, clip_dim=80)
    transformer = save(tmp_path_factory.mktemp("wan21") / "wan21.safetensors", turbo(config))
    others = dict(vae=folder, text_encoder=folder, tokenizer=folder, image_encoder=clip_file)
    return functools.partial(TurboVideoPipeline.from_pretrained, transformer, dtype=jnp.float32, **others)


@pytest.fixture(scope="module")
def clip_pipe(load_clip_pipe):
    return load_clip_pipe()


def test_clip(clip_pipe, picture, undecoded):
    assert clip_pipe.clip.config.num_layers == 1
    result = clip_pipe(PROMPT, image=picture, **SIZE).latents
    scale = clip_pipe.clip.norm.weight
    before = scale[...]
    scale[...] = 1.1 * before
    try:
        assert np.abs(clip_pipe(PROMPT, image=picture, **SIZE).latents - result).max() > 1e-4
    finally:
        scale[...] = before
    assert "a first image only" in refused(clip_pipe, PROMPT, image=picture, last_image=picture, **SIZE)


def test_clip_waits_in_host_memory(clip_pipe, load_clip_pipe, picture, undecoded):
    options = dict(image=picture, **SIZE)
    waiting = load_clip_pipe(memory=(clip_pipe.plan(**options).peak - 1) / USABLE_SHARE / GB, prepare=options)
    assert waiting.plan(**options).residency == Residency(idle_offloaded=True)
    np.testing.assert_array_equal(*(p(PROMPT, seed=3, **options).latents for p in (waiting, clip_pipe)))
    assert [total(waiting, name) for name in ("vae", "image_encoder")] == [0, 0]


def test_images_that_do_not_belong(pipe, demo_pipe, picture, tmp_path):
    assert "makes videos from images; give image=" in refused(pipe, PROMPT, **SIZE)
    for given in ({"image": picture}, {"last_image": picture}):
        assert "from text alone; leave out the image" in refused(demo_pipe, PROMPT, **given, **SIZE)
    text = tmp_path / "text.png"
    text.write_text("no image")
    assert "is no image that can be read" in refused(pipe, PROMPT, image=text, **SIZE)


def test_files_that_do_not_belong(pipe, folder, picture, tmp_path):
    load = TurboVideoPipeline.from_pretrained
    high = tmp_path / "x-high.pth"
    high.write_bytes((folder / "TurboWan-demo-high.pth").read_bytes())
    others = dict(vae=folder, text_encoder=folder, tokenizer=folder)
    assert "x-low.pth is not beside it" in refused(load, high, **others)
    wan, *_ = demo_configs(image=True)
    single = save(tmp_path / "single.safetensors", dict(generated(wan_layout(wan), jnp.bfloat16)))
    lora = LoRA(tmp_path / "any.safetensors", expert="low")
    assert "is the only network" in refused(load, single, loras=[lora], **others)
    clip = save(tmp_path / "clip.safetensors", turbo(small(in_channels=36, clip_dim=80)))
    assert "Wan-AI/Wan2.1-I2V-14B-480P could not be downloaded" in refused(load, clip, **others)
