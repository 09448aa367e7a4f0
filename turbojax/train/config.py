"""Settings of `scripts/train.py`, and what they make: the recipe and the optimizers.

Defaults are those of SLA fine-tuning of the 1.3B model as published; configs/train_*.py change what differs.
"""

import typing
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from ml_collections import ConfigDict

from turbojax.config import Setting, base_config, check_ranges
from turbojax.diffusion.samplers import Sampler
from turbojax.errors import UserError
from turbojax.json_reader import AnyOf, Array, Boolean, Enum, Integer, Nullable, Number, Schema, String
from turbojax.models.vae import VAEConfig, check_video
from turbojax.pipeline.request import make_sampler
from turbojax.train.autoencoder import Autoencoding
from turbojax.train.losses import Tangent
from turbojax.train.recipes import RCM, SLA, FlowMatching, Recipe
from turbojax.train.schedule import Phases, ema_exponent, learning_rate
from turbojax.train.step import Optimizer, adamw, muon
from turbojax.train.times import LogNormal, UniformShift

OPTIMIZERS = {"adamw": adamw, "muon": muon}

RECIPE, TANGENT = Enum("teacher", "sla", "rcm", "vae"), Enum(*typing.get_args(Tangent))
MOST = 2**31 - 1  # steps are counted in int32
SIZE = Integer(1, 2**20)
STRENGTH = Number(0, 1e6)
RATE, FRACTION = Number(0, 100, above=True), Number(0, 0.999999)
COUNT, PERIOD, SCALE = Integer(0, MOST), Integer(1, MOST), Number(0, 1000)
EULER, TIMES = Integer(0, 48), Enum("fixed", "drawn")
TEXT, OPTIONAL = String(), Nullable(String())
ATTENTION, FLOATS = Nullable(Enum("original", "sla")), Enum("bfloat16", "float32")
CROPS = Array(Array(Integer(1, 2**14), 2, 2), 0, 1000)
MESH = AnyOf("-1 or a whole number of devices", Enum(-1), SIZE)

FEW_STEPS = dict(sampler="rcm", num_inference_steps=4, sample_guidance=1.0)  # how a distilled network samples

TRAIN_SETTINGS: tuple[Setting, ...] = (
    Setting("recipe", "teacher", "teacher (flow matching on data), sla (fine-tuning), rcm (distillation), vae", RECIPE),
    Setting("workdir", str, "folder of the run: checkpoints, metrics, videos, and the network at the end", TEXT),
    Setting("data", str, "folder of shards from scripts/make_shards.py; toy makes one; shapes for vae", TEXT),
    Setting("weights", str, "network to start from: file, folder, Hugging Face repository, or random", TEXT),
    Setting("teacher", str, "network that sla and rcm learn from, likewise; default: the one to start from", OPTIONAL),
    Setting("model", "wan2.1-t2v-1.3b", "network that weights=random builds, toy or shapes for small ones", TEXT),
    Setting("attention_type", str, "original or sla; default: sla for recipe sla, else as the weights are", ATTENTION),
    Setting("sla_topk", 0.1, "fraction of key blocks that sla attends to", Number(0, 1, above=True)),
    Setting("sla_blocks", (64, 64), "rows of sla's query and key blocks, in training", Array(Integer(1, 2**16), 2, 2)),
    Setting("seed", 0, "of everything random; the same seed gives the same run", Integer(0, 2**32 - 1)),
    Setting("num_steps", 10_000, "optimizer steps, of student and critic together", COUNT),
    Setting("max_minutes", 0.0, "stop after so long, with a checkpoint to go on from; 0 for no limit", Number(0, 1e7)),
    Setting("batch_size", 64, "samples of a step, on all devices together", SIZE),
    Setting("accumulation", int, "micro-batches of a batch; default: a device has one sample of each", Nullable(SIZE)),
    Setting("remat", True, "recompute blocks for gradients, to save memory; over several devices always", Boolean()),
    Setting("dtype", "bfloat16", "what the networks compute in; master weights are float32", FLOATS),
    Setting("optimizer", "adamw", "adamw, or muon, which takes matrices inside the network from it", Enum(*OPTIMIZERS)),
    Setting("learning_rate", 1e-5, "peak of the schedule", RATE),
    Setting("learning_rate_end", 1.0, "fraction of it that is left at num_steps; it falls in a line", RATE),
    Setting("critic_learning_rate", 4e-7, "of rcm's fake score", RATE),
    Setting("warmup_steps", 100, "steps in which the learning rate rises", COUNT),
    Setting("beta1", 0.9, "of AdamW", FRACTION),
    Setting("beta2", 0.999, "of AdamW", FRACTION),
    Setting("weight_decay", 0.01, "of all parameters", STRENGTH),
    Setting("clip_norm", 0.0, "largest norm of the gradients, 0 for any", STRENGTH),
    Setting("ema_rate", 0.1, "width of the power-function EMA, as a fraction of the run", Number(0, 0.288, above=True)),
    Setting("time_mean", 1.5, "mean of log(sigma) of the noise levels that the data get", Number(-100, 100)),
    Setting("time_std", 1.6, "its standard deviation", RATE),
    Setting("text_dropout", 0.1, "teacher: fraction of samples that see the negative prompt, for guidance", FRACTION),
    Setting("kl_scale", 2e-4, "vae: weight of the divergence from the normal distribution", STRENGTH),
    Setting("num_frames", 33, "vae: of the videos that it sees, 4 n + 1", Integer(1, 2**12)),
    Setting("height", 128, "vae: likewise, pixels, a multiple of 8", Integer(8, 2**14)),
    Setting("width", 128, "vae: likewise", Integer(8, 2**14)),
    Setting("crops", (), "vae: (frames, side) of what a batch is cut to, in turn; whole videos if none", CROPS),
    Setting("workers", 0, "vae: processes that draw videos; 0 draws in turn with the steps", Integer(0, 1000)),
    Setting("guidance_scale", 5.0, "rcm: of the teacher", SCALE),
    Setting("tangent", "exact", "rcm: time derivative: exact, or in float32 difference_in_time or difference", TANGENT),
    Setting("tangent_step", 1e-4, "rcm: step of the differences", Number(0, 1, above=True)),
    Setting("tangent_warmup", 1000, "rcm: steps of consistency alone, while its time derivative is faded in", COUNT),
    Setting("discrete_steps", 0, "rcm: the teacher's Euler steps in discrete-time consistency; 0: continuous", EULER),
    Setting("student_every", 5, "rcm: afterwards every n-th step is the student's, the others the critic's", PERIOD),
    Setting("score_shift", 5.0, "rcm: shift of the uniform noise levels at which samples are judged", SCALE),
    Setting("simulation_steps", 4, "rcm: the student's samples take 1 to this many steps in turn", Integer(1, 1000)),
    Setting("simulation", "fixed", "rcm: their times: fixed as in sampling, or drawn like score_shift's", TIMES),
    Setting("loss_scale", 100.0, "rcm: of the consistency loss", STRENGTH),
    Setting("matching_scale", 1.0, "rcm: of distribution matching; 0 goes without it and the critic", STRENGTH),
    Setting("data_parallel", -1, "devices along the batch, each with all parameters; -1 for the rest", MESH),
    Setting("fsdp", 1, "devices along the batch that share the parameters", MESH),
    Setting("sequence", 1, "devices along the tokens", MESH),
    Setting("log_every", 10, "steps between metrics, which are means over these steps", PERIOD),
    Setting("checkpoint_every", 500, "steps between checkpoints", PERIOD),
    Setting("keep", 2, "checkpoints to keep", PERIOD),
    Setting("sample_every", 0, "steps between sample videos, 0 for none", COUNT),
    Setting("sample_prompts", "", "of the videos, with | between them; those of the first data if not given", TEXT),
    Setting("num_samples", 2, "videos where no prompts are given", Integer(1, 1000)),
    Setting("sampler", "unipc", "of the videos: rcm, euler or unipc", Enum("rcm", "euler", "unipc")),
    Setting("num_inference_steps", 50, "of the sampler: 1 to 4 with rcm", Integer(1, 1000)),
    Setting("sample_guidance", 5.0, "guidance of the videos, 1 for none", SCALE),
    Setting("shift", 5.0, "shift of the times of euler and unipc", Number(0, 1000, above=True)),
    Setting("sigma_max", 80.0, "first noise level of rcm", Number(0, 1e6, above=True)),
    Setting("vae", str, "of the videos: file, folder or demo; downloaded if not given", OPTIONAL),
    Setting("text_encoder", str, "of sample_prompts, likewise", OPTIONAL),
    Setting("tokenizer", str, "likewise", OPTIONAL),
)
RANGES: dict[str, Schema] = {setting.name: setting.schema for setting in TRAIN_SETTINGS if setting.schema}


def train_config(**changes: Any) -> ConfigDict:
    """Returns all settings with their defaults, `changes` on top; locked."""
    return base_config(TRAIN_SETTINGS, **changes)


def make_recipe(config: ConfigDict) -> Callable[[Any], Recipe]:
    """Makes the recipe of a configuration, which is still to be given the structure of its networks.

    Raises UserError for settings that cannot be.
    """
    ema_exponent(config.ema_rate)
    times = LogNormal(config.time_mean, config.time_std)
    if config.recipe == "teacher":
        return partial(FlowMatching, times=times, text_dropout=config.text_dropout, ema_rate=config.ema_rate)
    if config.recipe == "vae":
        return partial(Autoencoding, kl_scale=config.kl_scale, ema_rate=config.ema_rate)
    if config.recipe == "sla":
        return partial(SLA, times=times, ema_rate=config.ema_rate)
    if config.simulation == "fixed" and config.simulation_steps > 4:
        raise UserError(f"simulation_steps={config.simulation_steps}: fixed times are 4; take drawn ones for more")
    phases = Phases(
        tangent_warmup=config.tangent_warmup,
        student_freq=config.student_every,
        fake=config.matching_scale > 0,
        loss_scale=config.loss_scale,
        loss_scale_dmd=config.matching_scale,
        max_simulation_steps=config.simulation_steps,
    )
    score_times = UniformShift(config.score_shift)
    simulation_times = score_times if config.simulation == "drawn" else None
    same: dict[str, Any] = {name: config[name] for name in ("tangent", "tangent_step", "discrete_steps", "ema_rate")}
    noise_levels: dict[str, Any] = dict(times=times, score_times=score_times, simulation_times=simulation_times)
    return partial(RCM, guidance=config.guidance_scale, phases=phases, **noise_levels, **same)


def make_optimizers(config: ConfigDict, recipe: Recipe) -> dict[str, Optimizer]:
    """Makes those of the student and, where the recipe has one, the critic."""
    peaks = {"student": config.learning_rate}
    if recipe.phases.fake:
        peaks["critic"] = config.critic_learning_rate
    course: dict[str, Any] = {"warm_up": config.warmup_steps, "end": config.learning_rate_end}
    if config.learning_rate_end != 1:
        course["cycle"] = max(config.num_steps, config.warmup_steps + 1)
    settings = {name: config[name] for name in ("weight_decay", "clip_norm")}
    betas = config.beta1, config.beta2
    make: Callable[..., Optimizer] = partial(OPTIMIZERS[config.optimizer], betas=betas, **settings)
    return {name: make(learning_rate(peak, **course)) for name, peak in peaks.items()}


def check_settings(config: ConfigDict, *, drawn: Collection[str] = ()) -> None:
    """Raises UserError for what can be told without opening a file; `make_recipe` tells the rest.

    drawn: what the data of an autoencoder may be.
    """
    for name in ("workdir", "data", "weights"):
        if not config[name]:
            raise UserError(f"no {name}; give --config.{name}=, see --help")
    check_ranges(config, RANGES)
    if config.recipe == "vae":
        if config.data not in drawn:
            choice = " or ".join(f"--config.data={name}" for name in drawn)
            raise UserError(f"data={config.data}: an autoencoder learns from drawn videos; take {choice}")
        check_crops(config)
    if config.recipe == "rcm" and config.loss_scale == config.matching_scale == 0:
        raise UserError("loss_scale=0 and matching_scale=0 leave nothing to learn; give one of them")
    if config.recipe == "rcm" and config.tangent != "exact" and config.dtype != "float32":
        raise UserError(f"tangent={config.tangent} is lost in {config.dtype}; take --config.dtype=float32, or exact")
    if config.batch_size % (config.accumulation or 1):
        raise UserError(
            f"batch_size={config.batch_size} does not divide into accumulation={config.accumulation} micro-batches"
        )
    if config.sample_every:
        make_video_sampler(config)


def make_video_sampler(config: ConfigDict) -> Sampler:
    """Makes the sampler of the sample videos; raises UserError for settings that it cannot have."""
    return make_sampler(
        config.sampler, num_steps=config.num_inference_steps, sigma_max=config.sigma_max, shift=config.shift
    )


def check_crops(config: ConfigDict) -> None:
    """Raises UserError for videos that an autoencoder cannot take, and for crops that cannot be cut from them."""
    whole = config.num_frames, config.height, config.width
    crops = [(frames, side, side) for frames, side in config.crops]
    for size in (whole, *crops):
        check_video((1, *size, 3), VAEConfig.wan2_1())
        if any(part > all_of_it for part, all_of_it in zip(size, whole, strict=True)):
            raise UserError(f"crops={config.crops} do not fit into videos of {' x '.join(map(str, whole))}")
