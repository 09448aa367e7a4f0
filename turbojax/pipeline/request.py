"""Request of one call of the pipeline, checked before any network is there.

B batch; video is `b t h w c`, latents `[B, 1 + (frames - 1) / 4, height / 8, width / 8, 16]`.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from turbojax.config import check_ranges
from turbojax.diffusion import RCM, Euler, Sampler, UniPC
from turbojax.errors import UserError
from turbojax.media.image import ImageSource, adaptive_size, check_colour, read_image
from turbojax.media.video import check_fps, check_path, numbered
from turbojax.memory.estimates import Workload
from turbojax.models.image_condition import check_images, takes_images
from turbojax.models.published import ModelConfigs
from turbojax.models.vae import VAEConfig, check_step
from turbojax.models.wan import WanConfig
from turbojax.text_files import check_text

SamplerName = Literal["rcm", "euler", "unipc"]
SAMPLERS: tuple[str, ...] = ("rcm", "euler", "unipc")
TilingName = Literal["auto", "on", "off"]
VAE_TILING: tuple[str, ...] = ("auto", "on", "off")
TRAINED_FRAMES = 81  # of Wan's and TurboDiffusion's models


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """Asks for num_samples videos of each prompt; images are read when it is made.

    image: the first frame (a path, an array or a PIL image) for networks that make videos from images; last_image:
      the last frame, for those that take one. background shows through where they are transparent.
    adaptive_size: with an image, the video has its shape and the area of height x width; False squeezes the image.
    num_frames: 4 n + 1, up to 81 as trained; height, width: pixels, multiples of 16.
    sampler: a name, or a sampler of one's own, which has its own steps.
    num_inference_steps: 1 to 4 for "rcm", about 50 for "euler" and "unipc".
    guidance_scale: other than 1 runs the network for the negative prompt too (undistilled models).
    sigma_max: first noise level of rCM, None for 80, with an image 200; ode: deterministic steps.
    shift: of Euler's and UniPC's times.
    sla_topk: another fraction of key blocks for this call; compiles once for each value.
    seed: 0 to 2**64 - 1; the same one gives the same videos. It draws the noise of one batch, the samples of the
      first prompt, then those of the second: the prompts of a list get different noise.
    sample_index: the place in that batch of the first video that is made, so that sample i of prompt k can be made
      alone, up to rounding: that prompt, the same seed, num_samples=1, sample_index = k * (samples a prompt) + i.
    latents: standard normal `[B, t, h, w, c]` in place of the seed's; noise: `[steps, B, t, h, w, c]` likewise for
      the noise that rCM's SDE adds. B counts the samples of the first prompt, then those of the second.
    output: a file to write while decoding, with fps frames a second, as `save_video` does; several videos are
      numbered, clip_0000.mp4, clip_0001.mp4, ...
    vae_tiling: decode in tiles that pass into each other, with less memory and more time: "on", "off", or "auto"
      where whole frames would not fit.

    Raises UserError for what no network can make, and for files that cannot be read or written.
    """

    prompt: str | Sequence[str] = ""
    _: dataclasses.KW_ONLY
    image: ImageSource | None = None
    last_image: ImageSource | None = None
    background: str = "white"
    adaptive_size: bool = True
    negative_prompt: str | None = None
    num_frames: int = 81
    height: int = 480
    width: int = 832
    num_inference_steps: int = 4
    guidance_scale: float = 1.0
    sampler: SamplerName | Sampler = "rcm"
    sigma_max: float | None = None
    ode: bool = False
    shift: float = 5.0
    sla_topk: float | None = None
    seed: int = 0
    num_samples: int = 1
    sample_index: int = 0
    latents: jax.Array | np.ndarray | None = None
    noise: jax.Array | np.ndarray | None = None
    output: str | Path | None = None
    fps: int = 16
    vae_tiling: TilingName = "auto"

    def __post_init__(self):
        check_ranges(vars(self))
        if not self.prompts or self.num_samples < 1:
            raise UserError(
                f"{len(self.prompts)} prompts and num_samples={self.num_samples} ask for no video; "
                "give at least one of each"
            )
        for prompt in self.prompts:
            check_text("prompt", prompt)
        check_text("negative prompt", self.negative_prompt or "")
        check_seed(self.seed)
        if self.vae_tiling not in VAE_TILING:
            raise UserError(f"vae_tiling={self.vae_tiling!r} is unknown; choose {', '.join(VAE_TILING)}")
        sigma_max = RCM.sigma_max if self.sigma_max is None else self.sigma_max
        self._make_sampler(sigma_max)
        RCM(num_steps=1, sigma_max=sigma_max)  # other samplers do not look at it
        check_colour(self.background)
        for name in ("image", "last_image"):
            if (source := getattr(self, name)) is not None:
                object.__setattr__(self, name, read_image(source, background=self.background))
        batch, *place = self.shape(VAEConfig.wan2_1())  # sizes are the same for all networks
        most = 2**32 // math.prod(place) - batch  # the places of the seed's noise are numbered in 32 bits
        if not isinstance(self.sample_index, int | np.integer) or not 0 <= self.sample_index <= most:
            raise UserError(f"sample_index={self.sample_index} must be in 0..{most} for videos of this size")
        check_fps(self.fps)
        if self.output is not None:
            check_path(self.output)

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)

    @property
    def batch(self) -> int:
        """Number of videos."""
        return len(self.prompts) * self.num_samples

    @property
    def guided(self) -> bool:
        """True if the network runs for the negative prompt, too."""
        return self.guidance_scale != 1.0

    @property
    def pictures(self) -> list[np.ndarray]:
        """Images, uint8 `[H, W, 3]`: none, one, or the first and the last frame's."""
        return [np.asarray(image) for image in (self.image, self.last_image) if image is not None]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the videos: as given, or in the first image's shape at that area."""
        if self.image is None or not self.adaptive_size:
            return self.width, self.height
        return adaptive_size(self.pictures[0].shape[1::-1], (self.width, self.height))

    @property
    def outputs(self) -> list[Path]:
        """Files to write, one a video, or none."""
        if self.output is None:
            return []
        return [numbered(check_path(self.output), i, self.batch) for i in range(self.batch)]

    def shape(self, vae: VAEConfig) -> tuple[int, int, int, int, int]:
        """Returns the shape of the latents, `[B, t, h, w, c]`."""
        width, height = self.size
        return self.batch, *latent_shape(vae, self.num_frames, height, width)

    def sampler_for(self, config: WanConfig) -> Sampler:
        """Makes the sampler, with the first noise level that the network is run with where none is given."""
        return self._make_sampler(first_noise_level(config, self.sigma_max))

    def _make_sampler(self, sigma_max: float) -> Sampler:
        steps = self.num_inference_steps
        return make_sampler(self.sampler, num_steps=steps, sigma_max=sigma_max, ode=self.ode, shift=self.shift)

    def workload(self, configs: ModelConfigs) -> Workload:
        """Returns the size of the call, for its memory; a network that needs an image need not have it yet."""
        if self.image is not None:
            check_images(configs.transformer, self.image, self.last_image)
        batch, t, h, w, c = self.shape(configs.vae)
        return Workload((t, h, w, c), batch, self.guided, self.vae_tiling)

    def check(self, configs: ModelConfigs) -> None:
        """Raises UserError for what these networks cannot make."""
        check_images(configs.transformer, self.image, self.last_image)
        shape = self.shape(configs.vae)
        check_shape("latents", self.latents, shape)
        check_shape("noise", self.noise, (self.sampler_for(configs.transformer).num_steps, *shape))

    def remarks(self) -> list[str]:
        """Returns lines on what may not be as it was meant."""
        no_effect = self.negative_prompt and not self.guided
        ineffective = "negative_prompt has no effect with guidance_scale=1" if no_effect else None
        return [line for line in (beyond_training(self.num_frames), ineffective) if line]


def latent_shape(config: VAEConfig, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Returns the shape `[t, h, w, c]` of a video's latents; raises UserError for sizes that no latents have."""
    step = 2 * config.spatial_factor  # patches of the transformer are 2 x 2 latents
    check_step("height", height, step)
    check_step("width", width, step)
    check_step("num_frames", num_frames, config.temporal_factor, offset=1)
    t = 1 + (num_frames - 1) // config.temporal_factor
    return t, height // config.spatial_factor, width // config.spatial_factor, config.z_dim


def beyond_training(num_frames: int) -> str | None:
    """Says what to expect of more frames than the models were trained on; None for as many or fewer."""
    if num_frames <= TRAINED_FRAMES:
        return None
    return (
        f"{num_frames=} is more than the {TRAINED_FRAMES} that the models were trained on: expect motion that repeats, "
        "returns or drifts, and time and memory that grow faster than the frames"
    )


def check_seed(seed: int) -> None:
    """Raises UserError for a seed that is not in 0..2**64 - 1."""
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise UserError(f"{seed=} must be in 0..{2**64 - 1}")


def check_shape(name: str, value: jax.Array | np.ndarray | None, expected: tuple[int, ...]) -> None:
    """Raises UserError for an array of another shape."""
    if value is not None and value.shape != expected:
        raise UserError(f"{name} has the shape {value.shape} and must have {expected}")


def make_sampler(
    name: str | Sampler, *, num_steps: int, sigma_max: float, ode: bool = False, shift: float = 5.0
) -> Sampler:
    """Makes rCM for distilled models, Euler or UniPC for others (which start at their own noise level, 5000).

    A sampler that is given goes through as it is.
    """
    if isinstance(name, Sampler):
        return name
    if name == "rcm":
        return RCM(num_steps, sigma_max, ode)
    if name == "euler":
        return Euler(num_steps, shift)
    if name == "unipc":
        return UniPC(num_steps, shift)
    raise UserError(f"sampler={name!r} is unknown; choose {', '.join(SAMPLERS)}")


def first_noise_level(config: WanConfig, sigma_max: float | None) -> float:
    """Returns rCM's first noise level; None takes the checkpoint's, or the one that published networks run with."""
    published = 200.0 if takes_images(config) else 80.0
    return next(level for level in (sigma_max, config.sigma_max, published) if level is not None)
