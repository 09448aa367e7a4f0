"""Requests and load options: what is checked when they are made, and what follows from them and the networks."""

import dataclasses
import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from turbojax import LoadOptions, Request, TurboVideoPipeline, UserError
from turbojax.diffusion import RCM, Euler
from turbojax.memory.estimates import Workload
from turbojax.models.published import published_configs
from turbojax.models.wan import WanConfig
from turbojax.pipeline.denoise import abstract_arguments

TEXT = published_configs(WanConfig.t2v_1_3b(), two=False)
IMAGE = published_configs(WanConfig.i2v_a14b(), two=True)
PICTURE = np.zeros((120, 200, 3), np.uint8)


def parameters(function) -> dict[str, object]:
    """The defaults of a function's parameters by name, but self."""
    return {
        name: p.default for name, p in inspect.signature(function).parameters.items() if name not in ("self", "cls")
    }


def test_the_call_has_the_fields_of_a_request():
    call = parameters(TurboVideoPipeline.__call__)
    del call["progress"]
    assert call | {"prompt": ""} == parameters(Request)
    types, fields = inspect.get_annotations(TurboVideoPipeline.__call__), inspect.get_annotations(Request)
    assert {name: types[name] for name in call} == {name: fields[name] for name in call}


def test_loading_has_the_fields_of_the_options():
    options = {field.name: field.default for field in dataclasses.fields(LoadOptions)}
    for load, others in (
        (TurboVideoPipeline.from_pretrained, {"path_or_repo", "prepare"}),
        (TurboVideoPipeline.random, {"model", "tokenizer", "seed", "prepare"}),
    ):
        given = parameters(load)
        assert given.items() - options.items() == {(name, given[name]) for name in others} - options.items()


def test_what_follows_from_the_networks():
    request = Request(["a", "b"], num_samples=2, guidance_scale=3.0, height=720, width=1280)
    assert (request.batch, request.guided, request.size) == (4, True, (1280, 720))
    assert request.shape(TEXT.vae) == (4, 21, 90, 160, 16)
    assert request.workload(TEXT) == Workload((21, 90, 160, 16), 4, True)
    assert request.sampler_for(TEXT.transformer) == RCM(4, 80.0)
    assert request.sampler_for(IMAGE.transformer) == RCM(4, 200.0)
    assert Request(sigma_max=50.0).sampler_for(IMAGE.transformer) == RCM(4, 50.0)
    assert Request(sampler=Euler(7)).sampler_for(TEXT.transformer) == Euler(7)


def test_arguments_of_the_program():
    latents, text, negative, _, _, noise, _, images = abstract_arguments(Request(guidance_scale=2.0), TEXT)
    assert (latents.shape, text.shape, negative.shape) == ((1, 21, 60, 104, 16), (1, 512, 4096), (1, 512, 4096))
    assert (noise, images) == (None, {})
    assert abstract_arguments(Request(), IMAGE)[-1]["y"].shape == (1, 21, 60, 104, 20)


def test_images_are_read_once(tmp_path):
    from PIL import Image

    path = tmp_path / "picture.png"
    Image.fromarray(PICTURE).save(path)
    request = Request(image=path, last_image=PICTURE[:60])
    path.unlink()
    again = dataclasses.replace(request, seed=1)
    assert [picture.shape for picture in again.pictures] == [(120, 200, 3), (60, 200, 3)]
    assert again.size == (816, 496)


def test_a_plan_needs_no_image_and_a_call_does():
    Request().workload(IMAGE)
    with pytest.raises(UserError, match="makes videos from images; give image="):
        Request().check(IMAGE)
    for check in (Request(image=PICTURE).workload, Request(image=PICTURE).check):
        with pytest.raises(UserError, match="makes videos from text alone"):
            check(TEXT)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "caf\udce9"}, "the prompt is not UTF-8 after 'caf'"),
        ({"negative_prompt": "\udce9"}, "the negative prompt is not UTF-8"),
        ({"background": "blurple"}, "background='blurple' is no colour"),
        ({"image": "nowhere.png"}, r"the image 'nowhere\.png' does not exist"),
        ({"output": "x.avi"}, r"output 'x\.avi' has no video format"),
        ({"sampler": "euler", "sigma_max": -1.0}, r"sigma_max=-1\.0"),
    ],
    ids=str,
)
def test_what_no_network_can_make(fields, message):
    with pytest.raises(UserError, match=message):
        Request(**fields)


def test_an_unknown_field():
    with pytest.raises(TypeError, match="hight"):
        Request(hight=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory": "much"}, "memory='much' is unknown"),
        ({"boundary": 2.0}, r"boundary=2\.0 must be an RF time between 0 and 1"),
        ({"model": "wan9"}, "model='wan9' is unknown"),
        ({"attention_type": "flash"}, "attention_type='flash' is unknown"),
        ({"quant_scheme": "channel", "quant_linear": False}, "has no effect with quant_linear=False; leave out one"),
    ],
    ids=str,
)
def test_what_no_network_can_have(fields, message):
    with pytest.raises(UserError, match=message):
        LoadOptions(weights="any", **fields)


def test_equal_options_are_one_pipelines():
    options = LoadOptions(weights="random", dtype=jnp.dtype("bfloat16"))
    assert options == LoadOptions(weights="random", dtype=jnp.dtype("bfloat16"))
    assert len({options, dataclasses.replace(options, quant_linear=True), dataclasses.replace(options)}) == 2
