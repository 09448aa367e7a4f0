"""The pipeline with the demo's files: seeds, samples, prompts, guidance, settings between calls, and its errors."""

import logging
import re
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.weights.checkpoints import save, small, turbo
from turbojax import CheckpointError, TurboVideoPipeline, UserError, VideoOutput
from turbojax.diffusion import normal
from turbojax.media.video import save_video
from turbojax.memory.estimates import Residency
from turbojax.memory.planner import GB, USABLE_SHARE, WeightBytes
from turbojax.models import published
from turbojax.models.vae import decoding_bytes
from turbojax.pipeline import loading, pipeline
from turbojax.pipeline.denoise import draw, draw_later, seed_words
from turbojax.weights.load import load_wan
from turbojax.weights.lora import LoRA
from turbojax.weights.options import NetworkOptions
from turbojax.weights.random import random_module as generate

SIZE = dict(height=32, width=48, num_frames=5)
LATENTS = (2, 4, 6, 16)
STEPS = 2
BIRD, CAT = "a red bird in the sky", "a green cat on the street"


@pytest.fixture
def run(demo_pipe):
    """The demo's pipeline with small sizes."""

    def run(prompt=BIRD, **options) -> VideoOutput:
        return demo_pipe(prompt, **(SIZE | {"num_inference_steps": STEPS} | options))

    return run


@pytest.fixture
def undecoded(monkeypatch):
    """Only latents: for what the VAE has no part in."""
    monkeypatch.setattr(pipeline, "decode", lambda vae, latents, tiled: iter(()))


def drawn(seed: int, batch: int = 1) -> dict[str, jax.Array]:
    """The noise that the pipeline draws from a seed."""
    first, steps = jax.random.split(jax.random.key(seed))
    shape = (batch, *LATENTS)
    noise = [jax.random.normal(jax.random.fold_in(steps, i), shape) for i in range(STEPS)]
    return {"latents": jax.random.normal(first, shape), "noise": jnp.stack(noise)}


def refused(run, *arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        run(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# What a call gives.


def test_output(run):
    result = run()
    assert (result.videos.shape, result.videos.dtype) == ((1, 5, 32, 48, 3), np.uint8)
    assert (result.latents.shape, result.latents.dtype) == ((1, *LATENTS), jnp.float32)
    assert set(result.timings) == {"text", "diffusion", "vae", "file", "compile"}
    assert all(seconds >= 0 for seconds in result.timings.values())
    assert result.videos.std() > 1


def test_seeds(run):
    first, again, other = run(seed=3), run(seed=3), run(seed=4)
    np.testing.assert_array_equal(first.videos, again.videos)
    np.testing.assert_array_equal(first.latents, again.latents)
    assert (first.videos != other.videos).mean() > 0.5


def test_a_second_call_compiles_nothing(demo_pipe, run):
    run(seed=1)
    compiled = len(demo_pipe._programs)
    result = run(CAT, seed=2)
    assert len(demo_pipe._programs) == compiled
    assert result.timings["compile"] < 0.02
    assert (result.videos != run(BIRD, seed=2).videos).any()
    assert (result.latents != run(CAT, seed=2, sigma_max=20.0).latents).any()
    assert len(demo_pipe._programs) == compiled  # its times are arguments


def test_given_noise_is_what_a_seed_draws(run):
    expected = run(seed=7)
    for given in (drawn(7), {"latents": drawn(7)["latents"]}, {"noise": drawn(7)["noise"]}):
        np.testing.assert_allclose(run(seed=7, **given).latents, expected.latents, atol=1e-5)
    other_seed = run(seed=8, **{name: np.asarray(value) for name, value in drawn(7).items()})
    np.testing.assert_allclose(other_seed.latents, expected.latents, atol=1e-5)


def test_samples(run):
    result = run(num_samples=2)
    assert result.videos.shape == (2, 5, 32, 48, 3)
    assert (result.videos[0] != result.videos[1]).mean() > 0.5


def test_prompts_come_in_order(run, undecoded):
    noise = drawn(5, batch=4)
    four = run([BIRD, CAT], num_samples=2, **noise).latents
    assert four.shape == (4, *LATENTS)
    for i, prompt in enumerate((BIRD, BIRD, CAT, CAT)):
        own = {"latents": noise["latents"][i : i + 1], "noise": noise["noise"][:, i : i + 1]}
        np.testing.assert_allclose(run(prompt, **own).latents[0], four[i], atol=2e-4)


@pytest.mark.parametrize("options", [{}, {"ode": True}, {"sampler": "euler"}, {"sampler": "unipc"}], ids=str)
def test_any_sample_can_be_made_alone(run, undecoded, options):
    batch = run([BIRD, CAT], num_samples=2, seed=2**40 + 9, **options).latents
    assert len({latents.tobytes() for latents in np.asarray(batch)}) == 4
    for i, prompt in enumerate((BIRD, BIRD, CAT, CAT)):
        alone = run(prompt, sample_index=i, seed=2**40 + 9, **options).latents
        np.testing.assert_allclose(alone[0], batch[i], atol=2e-4)
    two = run([BIRD, CAT], sample_index=1, seed=2**40 + 9, **options).latents
    np.testing.assert_allclose(two, batch[1:3], atol=2e-4)


def test_noise_of_later_samples_is_that_of_the_batch_to_the_bit():
    shape = (2, 3, 4, 6, 16)
    for seed in (0, 7, 2**32 - 1, 2**40 + 1, 2**64 - 1):
        words = seed_words(seed)
        batch, key = draw(words, (5, *shape[1:]))
        later, noise, later_key = draw_later(words, shape, np.uint32(3), 2)
        np.testing.assert_array_equal(later, batch[3:])
        steps = [normal(jax.random.fold_in(key, i), batch.shape)[3:] for i in range(2)]
        np.testing.assert_array_equal(noise, steps)
        np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(later_key))


def test_seeds_of_32_bits_draw_what_they_always_drew():
    for seed in (0, 5, 2**32 - 1):
        first, steps = jax.random.split(jax.random.key(np.uint32(seed)))
        noise, key = draw(seed_words(seed), (1, *LATENTS))
        np.testing.assert_array_equal(noise, normal(first, (1, *LATENTS)))
        np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(steps))
    expected = [1.1140472, 0.1416313, -0.5224542, -0.4330463]  # of seed 7, as the first release drew it
    np.testing.assert_allclose(draw(seed_words(7), (1, *LATENTS))[0].reshape(-1)[:4], expected, rtol=1e-6)


def test_seeds_as_wan_prints_them(run, undecoded):
    wan = 6789012345678901234
    first, again = run(seed=wan).latents, run(seed=wan).latents
    np.testing.assert_array_equal(first, again)
    assert all((first != run(seed=other).latents).any() for other in (wan % 2**32, wan >> 32, wan + 2**32))


def test_more_frames_than_trained_are_made_and_told(run, demo_pipe, caplog):
    sizes = dict(height=16, width=16, num_inference_steps=1)
    result = run(num_frames=85, **sizes)
    told = [record.getMessage() for record in caplog.records if "81" in record.getMessage()]
    assert result.videos.shape[1] == 85
    assert told == result.warnings[:1]
    assert told[0].startswith("num_frames=85 is more than the 81 that the models were trained on: expect motion that")
    assert str(demo_pipe.plan(num_frames=85, **sizes)).endswith(told[0])
    assert not any("trained" in line for line in run(num_frames=81, **sizes).warnings)
    assert "trained" not in str(demo_pipe.plan(num_frames=81, **sizes))


def test_prompts_that_are_cut_are_told_once(run, undecoded, caplog):
    words = " ".join(f"{i:03}" for i in range(200))  # four tokens each
    result = run([BIRD, words], num_samples=2, num_frames=1)
    told = [record.getMessage() for record in caplog.records if "is cut" in record.getMessage()]
    assert len(told) == 1
    assert told[0] in result.warnings


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_guidance(run, undecoded, sampler):
    settings = dict(sampler=sampler, num_inference_steps=3, guidance_scale=5.0)
    plain, negative, again = (run(negative_prompt=text, **settings).latents for text in (None, CAT, ""))
    np.testing.assert_array_equal(plain, again)
    assert np.abs(plain - negative).max() > 1e-3


def test_without_guidance_the_negative_prompt_is_ignored(run, caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        ignored = run(negative_prompt=CAT, guidance_scale=1.0)
    assert [record.message for record in caplog.records] == ["negative_prompt has no effect with guidance_scale=1"]
    np.testing.assert_array_equal(ignored.latents, run().latents)


def test_one_frame(run):
    assert run(num_frames=1).videos.shape == (1, 1, 32, 48, 3)


def test_files_are_written_while_decoding(run, tmp_path, monkeypatch):
    events: list[str] = []
    decode, open_video = pipeline.decode, pipeline.open_video

    def recording_decode(*arguments, **options):
        for frames in decode(*arguments, **options):
            events.append(f"decoded {len(frames)}")
            yield frames

    @contextmanager
    def recording_open(*arguments):
        with open_video(*arguments) as append:
            yield lambda frames: events.append(f"appended {len(frames)}") or append(frames)
        events.append("closed")

    monkeypatch.setattr(pipeline, "decode", recording_decode)
    monkeypatch.setattr(pipeline, "open_video", recording_open)
    result = run(num_samples=2, output=tmp_path / "x.gif", fps=10)
    assert events == ["decoded 1", "appended 1", "decoded 4", "appended 4", "closed"] * 2
    assert [path.name for path in result.files] == ["x_0000.gif", "x_0001.gif"]
    assert sorted(tmp_path.iterdir()) == result.files
    for video, path in zip(result.videos, result.files, strict=True):
        save_video(video, tmp_path / "same.gif", fps=10)
        assert path.read_bytes() == (tmp_path / "same.gif").read_bytes()
    assert run().files == []


def test_nothing_is_written_for_nan(demo_pipe, tmp_path, run, monkeypatch):
    monkeypatch.setattr(demo_pipe, "_sample", lambda *arguments: jnp.full((1, *LATENTS), jnp.nan))
    assert "NaN" in refused(run, output=tmp_path / "x.mp4")
    assert not list(tmp_path.iterdir())


def test_tiles_where_memory_is_short(demo_pipe, run, monkeypatch):
    whole = run(seed=5).videos
    assert np.abs(run(seed=5, vae_tiling="on").videos.astype(int) - whole).max() <= 1  # one tile, at this size
    used: list[bool] = []

    def decode(vae, latents, *, tiled):
        used.append(tiled)
        return iter(())

    monkeypatch.setattr(pipeline, "decode", decode)
    needed = decoding_bytes(demo_pipe.vae, *LATENTS[1:3])
    for memory in ({}, *({"bytes_limit": needed + more, "bytes_in_use": 100} for more in (100, 99))):
        monkeypatch.setattr("turbojax.pipeline.decode.memory_stats", lambda memory=memory: memory)
        run(seed=5)
        run(seed=5, vae_tiling="off")
    assert used == [False, False, False, False, True, False]
    monkeypatch.setattr(
        "turbojax.pipeline.decode.memory_stats", lambda: {"bytes_limit": 80 * 10**9, "bytes_in_use": 100}
    )
    monkeypatch.setattr(demo_pipe, "memory", needed / 1e9)
    run(seed=5)
    assert used[-1]


# Other ways to make one.


def test_sla_int8_and_bfloat16(demo, undecoded, caplog):
    """Options reach the network; sla_topk can change between calls."""
    with caplog.at_level(logging.WARNING, logger="absl"):
        pipe = TurboVideoPipeline.from_pretrained(demo, attention_type="sla", sla_topk=0.2, quant_linear=True)
    assert [record.message for record in caplog.records] == [
        "TurboWan-demo.pth was not trained with SLA: proj_l starts at zero"
    ]
    c = pipe.transformer.config
    assert (c.attention_type, c.sla_topk, c.dtype, c.quant.scheme) == ("sla", 0.2, jnp.bfloat16, "block128")
    settings = dict(height=128, width=192, num_frames=13, num_inference_steps=1)  # 384 tokens: 6 blocks of keys
    usual, same, more = (pipe(BIRD, sla_topk=topk, **settings).latents for topk in (None, 0.2, 1.0))
    assert len(pipe._programs) == 2
    np.testing.assert_array_equal(usual, same)
    assert np.abs(usual - more).max() > 1e-3
    assert pipe.transformer.config.sla_topk == 0.2
    assert "sla_topk=2.0" in refused(pipe, BIRD, sla_topk=2.0, **settings)


@pytest.mark.parametrize("options", [{}, {"quant_linear": True, "attention_type": "sla"}], ids=str)
def test_streamed_weights_give_the_same_videos(demo, options):
    """With another sla_topk and with guidance, too; a resident transformer computes once what its steps share."""
    settings = {"num_inference_steps": STEPS, **SIZE}
    if options:
        settings["sla_topk"] = 0.5
    options = options | {"dtype": jnp.float32}
    loaded = [TurboVideoPipeline.from_pretrained(demo, memory=memory, **options) for memory in ("resident", "stream")]
    told: list[tuple[str, float]] = []
    resident, streamed = (pipe(BIRD, **settings, progress=lambda *now: told.append(now)) for pipe in loaded)
    np.testing.assert_allclose(streamed.latents, resident.latents, rtol=0, atol=1e-5)
    assert np.abs(streamed.videos.astype(int) - resident.videos).max() <= 1
    assert set(streamed.timings) == set(resident.timings)
    steps = settings["num_inference_steps"]
    assert [share for stage, share in told if stage == "diffusion"][2:] == [step / steps for step in range(steps)]
    assert {stage for stage, _ in told} == set(resident.timings)
    assert told[-1] == ("vae", 1.0)
    if "quant_linear" not in options:
        guided = (pipe(BIRD, guidance_scale=3.0, **settings).latents for pipe in loaded)
        np.testing.assert_allclose(*guided, rtol=0, atol=1e-5)
    on_device, on_host = ([total(pipe.memory_report()[name]) for pipe in loaded] for name in ("transformer", "host"))
    assert on_device[1] < 0.65 * on_device[0]  # float32 embeddings stay
    assert on_host[1] - on_host[0] == on_device[0] - on_device[1]


def test_what_is_idle_in_host_memory_gives_the_same_videos(demo, demo_pipe, run):
    """Chosen first where a limit is short; before and after a call the device has neither VAE nor embeddings."""
    settings = {"num_inference_steps": STEPS, **SIZE}
    short = (demo_pipe.plan(**settings).peak - 1) / USABLE_SHARE / GB
    waiting = TurboVideoPipeline.from_pretrained(demo, dtype=jnp.float32, memory=short, prepare=settings)
    plan, sizes = waiting.plan(**settings), WeightBytes(demo_pipe.configs)
    assert plan.residency == Residency(idle_offloaded=True)
    stages = {stage.name: stage for stage in plan.stages}
    for _ in range(2):
        on_device = {name: total(by_dtype) for name, by_dtype in waiting.memory_report().items()}
        assert on_device["vae"] == 0
        assert on_device["host"] == sizes.vae + sizes.embeddings + waiting.text.table.nbytes
        assert on_device["transformer"] == stages["diffusion"].weights - sizes.text.kept(False)
        programs = len(waiting._programs)
        ours, theirs = waiting(BIRD, **settings), run()
        np.testing.assert_array_equal(ours.latents, theirs.latents)
        np.testing.assert_array_equal(ours.videos, theirs.videos)
        assert len(waiting._programs) == programs  # those compiled ahead take the embeddings from host memory
    assert stages["vae"].weights - stages["diffusion"].weights == sizes.vae


def total(sizes: dict[str, int]) -> int:
    return sum(sizes.values())


def test_plan(demo_pipe):
    """As it is loaded, for another size, and as it would be for a limit; here without a compiler's help."""
    assert demo_pipe.text.encoder is not None  # loaded now, if it was not
    found, larger = demo_pipe.plan(**SIZE), demo_pipe.plan(height=720, width=1280)
    assert [stage.name for stage in found.stages] == ["load", "text", "diffusion", "vae"]
    assert (found.exact, found.limit, found.fits, found.residency) == (False, None, True, Residency())
    weights = {name: total(sizes) for name, sizes in demo_pipe.memory_report().items() if name != "host"}
    assert found.stages[0].weights == total(weights)
    assert larger.peak > 10 * found.peak
    tight = demo_pipe.plan(memory=0.9 * found.peak / GB, **SIZE)
    assert tight.residency.transformer_streamed
    assert not found.residency.transformer_streamed
    assert "height=100 must be a multiple of 16" in refused(demo_pipe.plan, height=100)
    assert "memory='much' is unknown" in refused(demo_pipe.plan, memory="much")


def test_out_of_memory_names_settings(run, monkeypatch):
    def full(*arguments, **settings):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(pipeline, "decode", full)
    message = refused(run, BIRD, num_inference_steps=1)
    assert re.match(
        r"memory is not enough: diffusion needs about 0\.\d+ GB; set memory=stream, or quant_linear", message
    )


def test_too_small_a_card(demo):
    message = refused(TurboVideoPipeline.from_pretrained, demo, memory=0.001)
    assert "of the GPU's 0.00; set a smaller resolution" in message
    assert "memory='tiny' is unknown" in refused(TurboVideoPipeline.from_pretrained, demo, memory="tiny")


def test_parts_from_elsewhere(demo, tmp_path, demo_pipe):
    """A transformer's own file with the other parts given, as files or as folders."""
    weights = tmp_path / "model.safetensors"
    save(weights, turbo(small()))
    pipe = TurboVideoPipeline.from_pretrained(
        weights,
        vae=demo,
        text_encoder=str(demo / "models_t5_umt5-xxl-enc-bf16.pth"),
        tokenizer=demo / "google" / "umt5-xxl",
        dtype=jnp.float32,
    )
    assert pipe.transformer.config.ffn_dim == 384
    assert pipe.text.tokenizer.vocab_size == demo_pipe.text.tokenizer.vocab_size


def test_random_weights(demo_pipe, monkeypatch, caplog, undecoded):
    tokenizer, t5 = demo_pipe.text.tokenizer, demo_pipe.text.encoder.config
    others = {"random umT5": demo_pipe.text.encoder, "random VAE": demo_pipe.vae}  # to save the seconds they take
    monkeypatch.setattr(loading, "random_module", lambda *a, what, **k: others.get(what) or generate(*a, **k))
    monkeypatch.setattr(published.UMT5Config, "xxl", lambda dtype: t5)
    monkeypatch.setitem(published.MODELS, "tiny", lambda **changes: small(num_layers=1, **changes))
    with caplog.at_level(logging.WARNING, logger="absl"):
        pipe = TurboVideoPipeline.random("tiny", tokenizer, quant_linear=True)
    assert "Weights are random: tiny at full size" in caplog.text
    result = pipe(BIRD, num_inference_steps=1, **SIZE)
    assert np.isfinite(result.latents).all()
    assert np.asarray(result.latents).std() > 0.1
    assert "choose one of wan2.1-t2v-1.3b, " in refused(TurboVideoPipeline.random, "huge", tokenizer)


# What cannot be, said before anything is computed.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 100}, "height=100 must be a multiple of 16; nearest: 96, 112"),
        ({"width": 8}, "width=8 must be a multiple of 16; nearest: 16"),
        ({"height": 0}, "height=0 must be a multiple of 16; nearest: 16"),
        ({"num_frames": 80}, "num_frames=80 must be 1 + a multiple of 4; nearest: 77, 81"),
        ({"num_frames": 0}, "num_frames=0 must be 1 + a multiple of 4; nearest: 1"),
        ({"num_inference_steps": 5}, "num_steps=5"),
        ({"num_inference_steps": 0}, "num_steps=0"),
        ({"sampler": "euler", "num_inference_steps": 0}, "num_steps=0"),
        ({"sigma_max": -1.0}, "sigma_max=-1.0"),
        ({"sampler": "ddim"}, "sampler='ddim' is unknown; choose rcm, euler, unipc"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"prompt": []}, "0 prompts"),
        ({"seed": -1}, "seed=-1 must be in 0..18446744073709551615"),
        ({"seed": 2**64}, "seed=18446744073709551616 must be in 0..18446744073709551615"),
        ({"seed": 1.5}, "seed=1.5 must be in 0.."),
        ({"sample_index": -1}, "sample_index=-1 must be in 0..5592404 for videos of this size"),
        ({"sample_index": 5592405}, "sample_index=5592405 must be in 0..5592404"),
        ({"sla_topk": 0.5}, "attention_type='sla'"),
        ({"vae_tiling": "yes"}, "vae_tiling='yes' is unknown; choose auto, on, off"),
        ({"output": "x.avi"}, "output 'x.avi' has no video format; end it in .mp4, .gif, .png"),
        ({"output": "x.mp4", "fps": 0}, "fps=0 must be positive"),
        (
            {"latents": np.zeros((1, 2, 4, 6, 15))},
            "latents has the shape (1, 2, 4, 6, 15) and must have (1, 2, 4, 6, 16)",
        ),
        ({"noise": np.zeros((1, *LATENTS))}, "noise has the shape (1, 2, 4, 6, 16) and must have (2, 1, 2, 4, 6, 16)"),
    ],
    ids=str,
)
def test_impossible_settings(run, options, message):
    assert message in refused(run, **options)


def test_nan(demo_pipe, demo):
    broken = load_wan(demo / "TurboWan-demo.pth", NetworkOptions(dtype=jnp.float32))
    broken.head.proj.bias[...] = jnp.full_like(broken.head.proj.bias[...], jnp.nan)
    pipe = TurboVideoPipeline(broken, demo_pipe.vae, demo_pipe.text)
    message = refused(pipe, BIRD, num_inference_steps=1, **SIZE)
    assert message == "the network returned NaN or infinity; check the checkpoint, or try dtype float32"
    pipe.experts = demo_pipe.experts
    assert set(pipe(BIRD, num_inference_steps=1, **SIZE).timings) == {"text", "diffusion", "vae", "file", "compile"}


def test_a_text_encoder_of_another_model(demo_pipe, tmp_path):
    model = load_wan(save(tmp_path / "other.pth", turbo(small(text_dim=32))))
    message = refused(TurboVideoPipeline, model, demo_pipe.vae, demo_pipe.text)
    assert message.startswith("the text encoder gives 64 features and the transformer takes 32")


def test_what_is_not_found(demo, tmp_path):
    load = TurboVideoPipeline.from_pretrained
    assert "is neither a file, a folder nor a repository" in refused(load, tmp_path / "nothing.pth")
    assert "holds no transformer checkpoint" in refused(load, tmp_path)
    weights = save(tmp_path / "model.pth", turbo(small()))
    assert "Wan-AI/Wan2.1-T2V-1.3B could not be downloaded" in refused(load, weights)
    others = dict(vae=demo / "Wan2.1_VAE.pth", text_encoder=demo / "models_t5_umt5-xxl-enc-bf16.pth")
    for name in ("vae", "text_encoder", "tokenizer"):
        given = {**others, "tokenizer": demo / "google" / "umt5-xxl", name: tmp_path / "nothing.pth"}
        with pytest.raises(CheckpointError, match=r"nothing\.pth does not exist"):
            load(weights, **given)


def test_a_missing_lora_is_told_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(loading.files, "find_components", lambda *_: pytest.fail("asked for the other files first"))
    save(tmp_path / "network.safetensors", turbo(small()))
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors"):
        TurboVideoPipeline.from_pretrained(
            tmp_path / "network.safetensors", loras=[LoRA(tmp_path / "nowhere.safetensors")]
        )
