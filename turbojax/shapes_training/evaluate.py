"""Measures the small model: whether its videos show what prompts ask for, and what fewer steps, sparse attention and
int8 weights cost.

Prompts ask for kinds of things that were never trained on. Noise is drawn for each prompt by its number, so that all
variants start from the same, however prompts are put into batches.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from absl import logging
from PIL import Image
from scipy.ndimage import uniform_filter

from turbojax.errors import UserError
from turbojax.files import whole_file
from turbojax.media.quality import psnr
from turbojax.media.video_checks import flaws
from turbojax.pipeline.pipeline import TurboVideoPipeline
from turbojax.pipeline.request import latent_shape
from turbojax.shapes import SHIPPED_SIGMA_MAX, SHIPPED_TOPK
from turbojax.shapes.judge import Judge
from turbojax.shapes.scene import Scene, caption, random_scene

Network = Literal["teacher", "rcm", "merged", "shipped"]
# Where the networks of a folder of scripts/train_shapes.py are.
NETWORKS: dict[Network, str] = {
    "teacher": "teacher/transformer.safetensors",
    "rcm": "rcm/transformer.safetensors",
    "merged": "merged/transformer.safetensors",
    "shipped": "model/TurboWan-shapes-quant.safetensors",
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A network and how it is run.

    load, call: settings of `TurboVideoPipeline.from_pretrained` and of its call, where they differ from the defaults.
    """

    network: Network
    load: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)


DENSE = "rcm, 4 steps"  # what sparse and int8 variants are compared with
SHARES = (0.05, 0.1, 0.25, SHIPPED_TOPK, 1.0)
SIGMAS = (20, 80, 200, 400)  # besides the shipped one
GUIDED = dict(guidance_scale=5.0, shift=8.0)  # half of UniPC's steps above log sigma 2, where shapes are decided


def sla(topk: float, attention_type: str = "sla") -> dict[str, Any]:
    return dict(attention_type=attention_type, sla_topk=topk)


def few(steps: int = 4, sigma_max: float = SHIPPED_SIGMA_MAX, **call: Any) -> dict[str, Any]:
    return dict(num_inference_steps=steps, sigma_max=float(sigma_max), **call)


VARIANTS: dict[str, Variant] = {
    DENSE: Variant("rcm", call=few()),
    "teacher, 50 steps": Variant("teacher", call=dict(sampler="unipc", num_inference_steps=50)),
    **{f"rcm, {n} step{'s' * (n > 1)}": Variant("rcm", call=few(n)) for n in (2, 1)},
    "rcm, ode": Variant("rcm", call=few(ode=True)),
    **{f"rcm, sigma_max {sigma}": Variant("rcm", call=few(sigma_max=sigma)) for sigma in SIGMAS},
    **{f"sla, topk {share}": Variant("merged", sla(share), few()) for share in SHARES},
    "sagesla": Variant("merged", sla(SHIPPED_TOPK, "sagesla"), few()),
    **{
        f"int8, {scheme}": Variant("rcm", dict(quant_linear=True, quant_scheme=scheme), few())
        for scheme in ("block128", "channel", "channel_weights")
    },
    **{
        f"shipped: sla and int8, {n} step{'s' * (n > 1)}": Variant("shipped", sla(SHIPPED_TOPK), few(n))
        for n in (4, 2, 1)
    },
}
QUICK = ("shipped: sla and int8, 4 steps",)


@dataclasses.dataclass(frozen=True)
class Task:
    """A scene, the prompt for it and its number, which its noise depends on."""

    number: int
    scene: Scene
    prompt: str


def held_out_tasks(count: int, *, seed: int) -> list[Task]:
    """Prompts in varied wording for things that no training example has."""
    tasks = []
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        scene = random_scene(rng, split="held out")
        tasks.append(Task(i, scene, caption(scene, rng)))
    return tasks


def noise(tasks: Sequence[Task], shape: tuple[int, ...], steps: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws the standard normal noise that steps start from, `[B, t, h, w, c]`, and add, `[steps, B, t, h, w, c]`."""
    drawn = [np.random.default_rng((seed, task.number)).standard_normal((5, *shape), np.float32) for task in tasks]
    both = np.stack(drawn, axis=1)
    return both[0], both[1 : steps + 1]


def make_videos(
    pipe: TurboVideoPipeline, tasks: Sequence[Task], call: Mapping[str, Any], size: Mapping[str, Any], *, seed: int
) -> np.ndarray:
    """Makes videos, uint8 `[B, T, H, W, 3]`; size: num_frames, height and width."""
    shape = latent_shape(pipe.vae.config, size["num_frames"], size["height"], size["width"])
    steps = call.get("num_inference_steps", 4)
    latents, added = noise(tasks, shape, steps, seed=seed)
    by_rcm = call.get("sampler", "rcm") == "rcm"
    return pipe(
        [task.prompt for task in tasks], latents=latents, noise=added if by_rcm else None, **size, **call
    ).videos


def load(variant: Variant, folder: Path, networks: Mapping[Network, str], *, dtype: Any) -> TurboVideoPipeline:
    """Loads the variant's pipeline; what is not the transformer is that of the shipped model."""
    path, model = folder / networks[variant.network], (folder / networks["shipped"]).parent
    components: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer"), model)
    return TurboVideoPipeline.from_pretrained(path, **components, dtype=dtype, cache_prompts=False, **variant.load)


def evaluate(
    names: Sequence[str],
    tasks: Sequence[Task],
    folder: Path,
    judge: Judge,
    *,
    size: Mapping[str, int],
    dtype: Any,
    seed: int = 0,
    batch: int = 20,
    networks: Mapping[Network, str] = NETWORKS,
    guided: Mapping[str, float] = GUIDED,
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Yields each variant's row of the table, and its videos, uint8 `[B, T, H, W, 3]`.

    guided: the teacher's guidance_scale and shift.
    A row has fractions of videos that are right in each respect and in all ("all"), the fraction with flaws, and,
    where DENSE is among the variants, PSNR (dB) and SSIM between its videos and these.
    """
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UserError(f"there is no variant {unknown[0]!r}; choose among {'; '.join(VARIANTS)}")
    files = sorted({networks[VARIANTS[name].network] for name in names})
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}; scripts/train_shapes.py makes that, and --variants= leaves some out"
        )
    reference = None
    for name in sorted(names, key=lambda name: name != DENSE):  # the others are compared with it
        variant = VARIANTS[name]
        call = {**variant.call, **(guided if variant.network == "teacher" else {})}
        pipe = load(variant, folder, networks, dtype=dtype)
        parts, start = [], time.perf_counter()
        for begin in range(0, len(tasks), batch):
            parts.append(make_videos(pipe, tasks[begin : begin + batch], call, size, seed=seed))
        videos, seconds = np.concatenate(parts), time.perf_counter() - start
        row: dict[str, Any] = {"variant": name, **judged(judge, tasks, videos)}
        if name == DENSE:
            reference = videos
        elif reference is not None:
            row |= {"psnr": psnr(videos, reference, most=99.0), "ssim": ssim(videos, reference)}
        row["seconds"] = seconds / len(tasks)
        logging.info("%s", row)
        yield row, videos


def judged(judge: Judge, tasks: Sequence[Task], videos: np.ndarray) -> dict[str, float]:
    results = [judge.compare(task.scene, video) for task, video in zip(tasks, videos, strict=True)]
    shares = {name: float(np.mean([result[name] for result in results])) for name in results[0]}
    return shares | {"flagged": float(np.mean([bool(flaws(video)) for video in videos]))}


def ssim(videos: np.ndarray, reference: np.ndarray, *, window: int = 7) -> float:
    """Returns mean structural similarity in windows of 7 x 7 pixels (Wang et al., 2004), channels apart."""
    return float(np.mean([ssim_of(a, b, window) for a, b in zip(videos, reference, strict=True)]))


def ssim_of(a: np.ndarray, b: np.ndarray, window: int) -> float:
    a, b = a.astype(np.float32), b.astype(np.float32)
    mean = lambda x: uniform_filter(x, (0, window, window, 0))  # noqa: E731
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    edge = window // 2
    values = top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(values[:, edge:-edge, edge:-edge].mean())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as Markdown."""
    columns = ("all", "shape", "colour", "motion", "background", "flagged", "psnr", "ssim", "seconds")
    lines = [f"| variant | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        shown = [f"{row[name]:.3g}" if name in row else "" for name in columns]
        lines.append(f"| {row['variant']} | {' | '.join(shown)} |")
    return "\n".join(lines)


def contact_sheet(videos: np.ndarray, path: Path, *, columns: int = 6) -> None:
    """Writes a picture with a row for each video and some of its frames side by side."""
    at = np.linspace(0, videos.shape[1] - 1, columns).round().astype(int)
    rows = np.concatenate(list(np.concatenate(list(video[at]), axis=1) for video in videos))
    with whole_file(path) as temporary:
        Image.fromarray(rows).save(temporary)
