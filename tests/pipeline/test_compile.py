"""Programs that compile in the background, and the pipeline's that are ready when its weights are."""

import threading

import jax
import jax.numpy as jnp
import pytest

from turbojax import TurboVideoPipeline, UserError
from turbojax.pipeline.compile import CompiledPrograms

FIRST_CALL = dict(prompt="a red bird", num_frames=5, height=16, width=32, num_inference_steps=1)
BIG = ("jit(sample)", "jit(run_decoder)", "jit(run_encoder)", "jit(zero_past_end)")


def fail():
    raise UserError("what went wrong")


def test_a_program_is_built_once():
    programs, built = CompiledPrograms(), []
    programs.start("ahead", lambda: built.append(threading.current_thread().name) or "program")
    programs.wait("ahead")
    assert [programs.get(name, lambda: built.append("here") or "other") for name in ("ahead", "now", "now")] == [
        *("program", "other", "other")
    ]
    assert len(built) == len(programs) == 2
    assert built[0].startswith("compile")
    programs.wait("never started")


def test_what_goes_wrong_in_the_background_comes_out():
    programs = CompiledPrograms()
    programs.start("bad", fail)
    for ask in (lambda: programs.wait("bad"), lambda: programs.get("bad", list)):
        with pytest.raises(UserError, match="what went wrong"):
            ask()


def test_nothing_is_begun_for_weights_that_do_not_load():
    programs, gate, built = CompiledPrograms(), threading.Event(), []
    for i in range(8):
        programs.start(i, lambda: gate.wait(10) and built.append(1))
    with pytest.raises(UserError), programs.needed():
        fail()
    gate.set()
    programs._pool.shutdown()
    assert len(built) <= 4  # those that had a thread


def test_the_first_call_finds_its_programs(demo):
    compiled: list[tuple[str, bool]] = []

    def listen(event, seconds, *, fun_name="", **options):
        if event.endswith("backend_compile_duration"):
            compiled.append((fun_name, threading.current_thread().name.startswith("compile")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        pipe = TurboVideoPipeline.from_pretrained(demo, dtype=jnp.float32, prepare=FIRST_CALL, cache_prompts=False)
        assert not pipe.text.loaded
        result = pipe(**FIRST_CALL)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert result.videos.shape == (1, 5, 16, 32, 3)
    big = sorted(entry for entry in compiled if entry[0] in BIG)
    assert all(ahead for _, ahead in big)
    # One chunk of one frame, one of four; the text encoder's may have been compiled by another test.
    assert [name for name, _ in big if name in BIG[:2]] == ["jit(run_decoder)"] * 2 + ["jit(sample)"]


def test_settings_of_the_first_call_are_checked_before_loading(demo):
    with pytest.raises(UserError, match="height=20 must be a multiple of 16"):
        TurboVideoPipeline.from_pretrained(demo, prepare=dict(height=20))
    with pytest.raises(TypeError, match="hight"):
        TurboVideoPipeline.from_pretrained(demo, prepare=dict(hight=32))
