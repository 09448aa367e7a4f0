"""The settings of `scripts/train.py`, and what they make: the recipe and the optimizers.

Defaults are those of SLA fine-tuning of the 1.3B model as published; configs/train_*.py change what differs.
"""

import typing
from typing import Any

from ml_collections import ConfigDict

from turbojax.config import Setting, base_config
from turbojax.errors import UserError
from turbojax.models.vae import VAEConfig, check_video
from turbojax.train.autoencoder import Autoencoding
from turbojax.train.losses import Tangent
from turbojax.train.recipes import RCM, SLA, FlowMatching, Recipe
from turbojax.train.schedule import LearningRate, Phases, ema_exponent
from turbojax.train.step import Optimizer, adamw, muon
from turbojax.train.times import LogNormal, UniformShift

RECIPES = ("teacher", "sla", "rcm", "vae")
OPTIMIZERS = {"adamw": adamw, "muon": muon}
TANGENTS = typing.get_args(Tangent)

TRAIN_SETTINGS: tuple[Setting, ...] = (
    Setting("recipe", "teacher", "teacher (flow matching on data), sla (fine-tuning), rcm (distillation) or vae"),
    Setting("workdir", str, "folder of the run: checkpoints, metrics, videos, and the network at the end"),
    Setting("data", str, "folder of shards, as scripts/make_shards.py writes them; toy makes one; shapes for vae"),
    Setting("weights", str, "network to start from: file, folder, Hugging Face repository, or random"),
    Setting("teacher", str, "network that sla and rcm learn from, likewise; the one to start from if not given"),
    Setting("model", "wan2.1-t2v-1.3b", "network that weights=random builds, toy or shapes for small ones"),
    Setting("attention_type", str, "original or sla; if not given sla for the recipe sla, else as the weights are"),
    Setting("sla_topk", 0.1, "share of key blocks that sla attends to"),
    Setting("sla_blocks", (64, 64), "rows of sla's query and key blocks, in training"),
    Setting("seed", 0, "of everything random; the same seed gives the same run"),
    Setting("num_steps", 10_000, "optimizer steps, of student and critic together"),
    Setting("max_minutes", 0.0, "stop after so long, with a checkpoint, to be gone on with; 0 for no limit"),
    Setting("batch_size", 64, "samples of a step, on all devices together"),
    Setting("accumulation", int, "micro-batches of a batch; as many as leave a device one sample if not given"),
    Setting("remat", True, "compute each block again for its gradients, to save memory; over several devices always"),
    Setting("dtype", "bfloat16", "what the networks compute in, bfloat16 or float32; master weights are float32"),
    Setting("optimizer", "adamw", "adamw, or muon, which takes matrices inside the network from it"),
    Setting("learning_rate", 1e-5, "peak of the schedule"),
    Setting("learning_rate_end", 1.0, "share of it that is left at num_steps; it falls in a line"),
    Setting("critic_learning_rate", 4e-7, "of rcm's fake score"),
    Setting("warmup_steps", 100, "steps in which the learning rate rises"),
    Setting("beta1", 0.9, "of AdamW"),
    Setting("beta2", 0.999, "of AdamW"),
    Setting("weight_decay", 0.01, "of all parameters"),
    Setting("clip_norm", 0.0, "largest norm of the gradients, 0 for any"),
    Setting("ema_rate", 0.1, "width of the power-function average, as a share of the run"),
    Setting("time_mean", 1.5, "mean of log(sigma) of the noise levels that the data get"),
    Setting("time_std", 1.6, "its standard deviation"),
    Setting("text_dropout", 0.1, "teacher: share of samples that see the negative prompt, for guidance"),
    Setting("kl_scale", 2e-4, "vae: weight of the divergence from the normal distribution"),
    Setting("num_frames", 33, "vae: of the videos that it sees, 4 n + 1"),
    Setting("height", 128, "vae: likewise, pixels, a multiple of 8"),
    Setting("width", 128, "vae: likewise"),
    Setting("crops", (), "vae: (frames, side) of what a batch is cut to, in turn; whole videos if there are none"),
    Setting("workers", 0, "vae: processes that draw videos; 0 draws in turn with the steps"),
    Setting("guidance_scale", 5.0, "rcm: of the teacher"),
    Setting("tangent", "exact", "rcm: time derivative: exact, or in float32 difference_in_time or difference"),
    Setting("tangent_step", 1e-4, "rcm: step of the differences"),
    Setting("tangent_warmup", 1000, "rcm: steps of consistency alone, while its time derivative is faded in"),
    Setting("student_every", 5, "rcm: afterwards every n-th step is the student's, the others the critic's"),
    Setting("score_shift", 5.0, "rcm: shift of the uniform noise levels at which student and teacher are compared"),
    Setting("loss_scale", 100.0, "rcm: of the consistency loss"),
    Setting("matching_scale", 1.0, "rcm: of distribution matching; 0 goes without it and the critic"),
    Setting("simulation_steps", 4, "rcm: the student's samples take 1 to this many steps in turn"),
    Setting("simulation", "fixed", "rcm: times of these steps: fixed as in sampling, or drawn like score_shift's"),
    Setting("data_parallel", -1, "devices along the batch, each with all parameters; -1 for the rest"),
    Setting("fsdp", 1, "devices along the batch that share the parameters"),
    Setting("sequence", 1, "devices along the tokens"),
    Setting("log_every", 10, "steps between metrics, which are means over these steps"),
    Setting("checkpoint_every", 500, "steps between checkpoints"),
    Setting("keep", 2, "checkpoints to keep"),
    Setting("sample_every", 0, "steps between sample videos, 0 for none"),
    Setting("sample_prompts", "", "of the videos, with | between them; those of the first data if not given"),
    Setting("num_samples", 2, "videos where no prompts are given"),
    Setting("sampler", "unipc", "of the videos: rcm, euler or unipc"),
    Setting("num_inference_steps", 50, "of the sampler: 1 to 4 with rcm"),
    Setting("sample_guidance", 5.0, "guidance of the videos, 1 for none"),
    Setting("shift", 5.0, "shift of the times of euler and unipc"),
    Setting("sigma_max", 80.0, "first noise level of rcm"),
    Setting("vae", str, "of the videos: file, folder or demo; downloaded if not given"),
    Setting("text_encoder", str, "of sample_prompts, likewise"),
    Setting("tokenizer", str, "likewise"),
)


def train_config(**changes: Any) -> ConfigDict:
    """All settings with their defaults, `changes` on top; locked."""
    return base_config(TRAIN_SETTINGS, **changes)


def make_recipe(config: ConfigDict) -> Recipe:
    """The recipe of a configuration; raises UserError for settings that cannot be."""
    ema_exponent(config.ema_rate)
    times = LogNormal(config.time_mean, config.time_std)
    if config.recipe == "teacher":
        if not 0 <= config.text_dropout < 1:
            raise UserError(f"text_dropout={config.text_dropout} must be in [0, 1); 0.1 is usual")
        return FlowMatching(times, config.text_dropout, ema_rate=config.ema_rate)
    if config.recipe == "vae":
        return Autoencoding(config.kl_scale, ema_rate=config.ema_rate)
    if config.recipe == "sla":
        return SLA(times, ema_rate=config.ema_rate)
    if config.recipe == "rcm":
        if config.simulation not in ("fixed", "drawn"):
            raise UserError(f"simulation={config.simulation!r} is unknown; choose fixed or drawn")
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
        return RCM(
            times,
            score_times=score_times,
            simulation_times=score_times if config.simulation == "drawn" else None,
            guidance=config.guidance_scale,
            tangent=config.tangent,
            tangent_step=config.tangent_step,
            ema_rate=config.ema_rate,
            phases=phases,
        )
    raise UserError(f"recipe={config.recipe!r} is unknown; choose {', '.join(RECIPES)}")


def make_optimizers(config: ConfigDict, recipe: Recipe) -> dict[str, Optimizer]:
    """For the student and, where the recipe has one, the critic."""
    peaks = {"student": config.learning_rate}
    if recipe.phases.fake:
        peaks["critic"] = config.critic_learning_rate
    settings = {
        "betas": (config.beta1, config.beta2),
        "weight_decay": config.weight_decay,
        "clip_norm": config.clip_norm,
    }
    course: dict[str, Any] = {"warm_up": config.warmup_steps, "end": config.learning_rate_end}
    if config.learning_rate_end != 1:
        course["cycle"] = max(config.num_steps, config.warmup_steps + 1)
    make = OPTIMIZERS[config.optimizer]
    return {name: make(LearningRate(peak, **course), **settings) for name, peak in peaks.items()}


POSITIVE = (
    "batch_size",
    "accumulation",
    "learning_rate",
    "critic_learning_rate",
    "learning_rate_end",
    "student_every",
    "simulation_steps",
    "log_every",
    "checkpoint_every",
    "keep",
    "num_samples",
    "tangent_step",
)
NOT_NEGATIVE = (
    "num_steps",
    "warmup_steps",
    "weight_decay",
    "clip_norm",
    "tangent_warmup",
    "loss_scale",
    "matching_scale",
    "sample_every",
    "kl_scale",
    "workers",
    "max_minutes",
)


def check_settings(config: ConfigDict) -> None:
    """Raises UserError for what can be told without opening a file; `make_recipe` tells the rest."""
    for name in ("workdir", "data", "weights"):
        if not config[name]:
            raise UserError(f"no {name}; give --config.{name}=, see --help")
    for name in POSITIVE:
        if config[name] is not None and not config[name] > 0:
            raise UserError(f"{name}={config[name]} must be positive")
    for name in NOT_NEGATIVE:
        if not config[name] >= 0:
            raise UserError(f"{name}={config[name]} must not be negative")
    if config.recipe == "vae":
        if config.data != "shapes":
            raise UserError(f"data={config.data}: an autoencoder learns from drawn videos; take --config.data=shapes")
        check_crops(config)
    for name in ("beta1", "beta2"):
        if not 0 <= config[name] < 1:
            raise UserError(f"{name}={config[name]} must be in [0, 1)")
    if config.recipe == "rcm" and config.loss_scale == config.matching_scale == 0:
        raise UserError("loss_scale=0 and matching_scale=0 leave nothing to learn; give one of them")
    if config.dtype not in ("bfloat16", "float32"):
        raise UserError(f"dtype={config.dtype!r} is unknown; choose bfloat16 or float32")
    if config.optimizer not in OPTIMIZERS:
        raise UserError(f"optimizer={config.optimizer!r} is unknown; choose {' or '.join(OPTIMIZERS)}")
    if config.tangent not in TANGENTS:
        raise UserError(f"tangent={config.tangent!r} is unknown; choose {', '.join(TANGENTS)}")
    if config.recipe == "rcm" and config.tangent != "exact" and config.dtype != "float32":
        raise UserError(f"tangent={config.tangent} is lost in {config.dtype}; take --config.dtype=float32, or exact")
    if config.attention_type not in (None, "original", "sla"):
        raise UserError(f"attention_type={config.attention_type!r} cannot be trained; choose original or sla")
    if config.batch_size % (config.accumulation or 1):
        raise UserError(
            f"batch_size={config.batch_size} does not divide into accumulation={config.accumulation} micro-batches"
        )


def check_crops(config: ConfigDict) -> None:
    """Raises UserError for videos that an autoencoder cannot take, and for crops that cannot be cut from them."""
    whole = config.num_frames, config.height, config.width
    if not all(isinstance(crop, tuple) and [type(size) for size in crop] == [int, int] for crop in config.crops):
        raise UserError(f"crops={config.crops} must be pairs of frames and side, as ((5, 48), (17, 32))")
    crops = [(frames, side, side) for frames, side in config.crops]
    for size in (whole, *crops):
        check_video((1, *size, 3), VAEConfig.wan2_1())
        if any(part > all_of_it for part, all_of_it in zip(size, whole, strict=True)):
            raise UserError(f"crops={config.crops} do not fit into videos of {' x '.join(map(str, whole))}")
