"""The tables that pages of docs/ hold between marks: the planner's choices, and measurements of benchmarks/*.json.

    python docs/tables.py

writes them anew; the build of the documentation fails where a page holds something else.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from turbojax.kernels.int8 import QuantConfig
from turbojax.media.video import video_size
from turbojax.memory.planner import GB, Plan
from turbojax.models.published import MODELS, TWO_EXPERTS, published_configs
from turbojax.pipeline.compile import plan_call
from turbojax.pipeline.pipeline import abstract_call

DOCS = Path(__file__).parent
BENCHMARKS = DOCS.parent / "benchmarks"

CARDS = (8, 12, 16, 24, 32, 40, 48, 80)  # GiB
NETWORKS = {"1.3B": "wan2.1-t2v-1.3b", "14B": "wan2.1-t2v-14b", "A14B": "wan2.2-i2v-a14b"}
LETTERS = {
    "idle_offloaded": "I",
    "text_streamed": "T",
    "vae_tiled": "V",
    "swap_experts": "E",
    "transformer_streamed": "S",
}

Measurement = dict[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


# The planner.


def cards(share: float) -> list[str]:
    """What the planner does for 81 frames where XLA may take this share of the card."""
    rows = []
    for name, model in NETWORKS.items():
        for resolution in ("480p", "720p"):
            for precision, quant in (("int8", QuantConfig()), ("bfloat16", None)):
                configs = published_configs(MODELS[model](attention_type="sla", quant=quant), two=model in TWO_EXPERTS)
                width, height = video_size(resolution, "16:9")
                call = abstract_call(configs, {"width": width, "height": height})
                limits = [share * card * 2**30 / GB for card in CARDS]
                plans = [plan_call(configs, call, limit, exact=False) for limit in limits]
                rows.append([f"{name}, {resolution}, {precision}", *map(choice, plans)])
    return table(["", *(f"{card} GB" for card in CARDS)], rows)


def choice(plan: Plan) -> str:
    """The peak in GB and a letter for each measure taken, or a dash where it does not fit."""
    letters = "".join(letter for field, letter in LETTERS.items() if getattr(plan.residency, field))
    return f"{plan.peak / GB:.1f} {letters}".rstrip() if plan.fits else "-"


# Measurements.


def read(name: str) -> Measurement:
    return json.loads((BENCHMARKS / f"{name}.json").read_text())


def sources(names: Iterable[str]) -> list[str]:
    """Where figures come from."""
    lines = [""]
    for name in names:
        m = read(name)
        lines.append(f"- `{m['command']}`, {m['date']}, {m['device']}, jax {m['versions']['jax']} (`{name}.json`)")
    return lines


def setting(m: Measurement) -> list[str]:
    """Card, network and size, linear layers, attention; the oldest files tell quantization by another name."""
    s = m["settings"]
    linear = s.get("quant_scheme") or "bfloat16"
    size = f"{s['model'].rpartition('-')[2].upper()}, {s['resolution']}"
    return [m["device"].removeprefix("NVIDIA ").split()[0], size, f"{linear}, {s['attention_type']}"]


def videos() -> list[str]:
    stages = {"text": "text", "diffusion": "diffusion", "vae": "VAE", "file": "file", "end_to_end": "end to end"}
    own = ("t2v_1_3b_480p_int8_sagesla", "t2v_14b_720p_int8_sagesla", "t2v_14b_720p_channel_sagesla")
    return seconds_of_stages(stages, (*own, "t2v_1_3b_480p", "t2v_14b_480p"))


def videos_of_images() -> list[str]:
    stages = {name: name for name in ("image", "experts", "diffusion")} | {"vae": "VAE", "end_to_end": "end to end"}
    return seconds_of_stages(stages, ("i2v_a14b_720p_int8_sagesla", "i2v_a14b_720p_24gb"))


def seconds_of_stages(stages: dict[str, str], names: Sequence[str]) -> list[str]:
    """Those of the last, warm call, and the peak of its process."""
    rows = []
    for name in names:
        m = read(name)
        warm = m["result"]["calls"][-1]
        rows.append([*setting(m), *(f"{warm['seconds'].get(stage, 0):.2f}" for stage in stages)])
        rows[-1].append(f"{warm['peak_bytes'] / GB:.1f}")
    return [*table(["card", "", "", *stages.values(), "peak, GB"], rows), *sources(names)]


def first_videos() -> list[str]:
    seconds = read("first_video")["seconds"]
    rows = [[name.removesuffix("_cache"), f"{taken:.1f}"] for name, taken in seconds.items()]
    return [*table(["compilation cache", "from launch to closed mp4"], rows), *sources(["first_video"])]


def diffusion() -> list[str]:
    names = ("diffusion_1_3b_480p_sla", "diffusion_14b_720p_sla")
    rows = []
    for name in names:
        m = read(name)
        seconds = f"{m['result']['seconds_warm']:.2f}"
        rows.append([*setting(m), seconds, f"{m['result']['peak_bytes'] / GB:.1f}"])
    return [*table(["card", "", "", "diffusion, 4 steps", "peak, GB"], rows), *sources(names)]


def linear() -> list[str]:
    schemes = ("block128", "block128_rows", "channel", "block128_weights", "channel_weights")
    rows = []
    for shape, by_scheme in read("linear")["result"].items():
        own = [f"{by_scheme[scheme]['speed_over_bfloat16']:.2f}x" for scheme in schemes]
        rows.append([shape, f"{by_scheme['bfloat16']['ms']:.2f} ms", *own])
    return [*table(["tokens x out x in", "bfloat16", *schemes], rows), *sources(["linear"])]


def linear_errors() -> list[str]:
    errors: dict[str, list[float]] = {}
    for by_scheme in read("linear")["result"].values():
        for scheme, measured in by_scheme.items():
            errors.setdefault(scheme, []).append(measured["relative_error"])
    rows = [[scheme, f"{min(all_):.1e} to {max(all_):.1e}"] for scheme, all_ in errors.items()]
    return [*table(["", "relative error"], rows), *sources(["linear"])]


def attention() -> list[str]:
    names = {
        "dense_ms": "dense",
        "sla_mosaic_ms": "sla, Hopper",
        "sla_triton_ms": "sla, Triton",
        "sagesla_ms": "sagesla",
    }
    rows = []
    for shape, measured in read("attention_h200")["result"].items():
        if "dense_ms" in measured:
            rows.append([shape, *(f"{measured[name]:.2f}" for name in names)])
    return [*table(["heads x tokens", *names.values()], rows), *sources(["attention_h200"])]


def training() -> list[str]:
    names = ("train_step_sla", "train_step_scm")
    rows = []
    for name in names:
        result = read(name)["result"]
        share = f"{result['model_flops_utilisation']:.2f}"
        rows.append([name.rpartition("_")[2], f"{result['seconds']:.2f}", f"{result['peak_bytes'] / GB:.1f}", share])
    return [*table(["recipe", "seconds", "peak, GB", "of the card's bfloat16 rate"], rows), *sources(names)]


TABLES: dict[str, Callable[[], list[str]]] = {
    "cards, 0.75": lambda: cards(0.75),
    "cards, 0.9": lambda: cards(0.9),
    "videos": videos,
    "videos of images": videos_of_images,
    "first videos": first_videos,
    "diffusion": diffusion,
    "linear": linear,
    "linear, errors": linear_errors,
    "attention": attention,
    "training": training,
}
MARKED = re.compile(r"(<!-- table: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def renewed(page: str) -> str:
    """A page with its tables as they are to be."""
    return MARKED.sub(lambda mark: "\n".join([mark[1], *TABLES[mark[2]](), "", mark[3]]), page)


def main() -> None:
    for path in DOCS.glob("*.md"):
        page = path.read_text(encoding="utf-8")
        if (new := renewed(page)) != page:
            path.write_text(new, encoding="utf-8")
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
