"""The tables that pages hold between marks: the planner's choices, and measurements of benchmarks/.

    python docs/tables.py

writes them anew; the build of the documentation fails where a page holds something else.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from turbojax.bench.report import peers
from turbojax.kernels.int8 import QuantConfig
from turbojax.media.video import video_size
from turbojax.memory.planner import GB, Plan
from turbojax.models.published import MODELS, TWO_EXPERTS, published_configs
from turbojax.pipeline.plan import plan_call
from turbojax.pipeline.request import Request

DOCS = Path(__file__).parent
BENCHMARKS = DOCS.parent / "benchmarks"
CARD = DOCS.parent / "turbojax" / "shapes" / "model" / "README.md"

SIZES = (8, 12, 16, 24, 32, 40, 48, 80)  # GiB
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


def gpus(fraction: float) -> list[str]:
    """Tabulates what the planner does for 81 frames where XLA may take this fraction of the GPU's memory."""
    rows = []
    for name, model in NETWORKS.items():
        for resolution in ("480p", "720p"):
            for precision, quant in (("int8", QuantConfig()), ("bfloat16", None)):
                configs = published_configs(MODELS[model](attention_type="sla", quant=quant), two=model in TWO_EXPERTS)
                width, height = video_size(resolution, "16:9")
                request = Request(width=width, height=height)
                limits = [fraction * size * 2**30 / GB for size in SIZES]
                plans = [plan_call(configs, request, limit, exact=False) for limit in limits]
                rows.append([f"{name}, {resolution}, {precision}", *map(choice, plans)])
    return table(["", *(f"{size} GB" for size in SIZES)], rows)


def choice(plan: Plan) -> str:
    """Returns the peak in GB and a letter for each saving taken, or a dash where it does not fit."""
    letters = "".join(letter for field, letter in LETTERS.items() if getattr(plan.residency, field))
    return f"{plan.peak / GB:.1f} {letters}".rstrip() if plan.fits else "-"


# Measurements, by their path in benchmarks/ without ".json".


def read(name: str) -> Measurement:
    return json.loads((BENCHMARKS / f"{name}.json").read_text())


def sources(names: Iterable[str]) -> list[str]:
    """Returns the lines that say where figures come from."""
    lines = [""]
    for name in names:
        m = read(name)
        lines.append(f"- `{m['command']}`, {m['date']}, {m['device']}, jax {m['versions']['jax']} (`{name}.json`)")
    return lines


def setting(m: Measurement) -> list[str]:
    """Returns GPU, network and size, linear layers and attention; the oldest files have no quantization scheme."""
    s = m["settings"]
    linear = s.get("quant_scheme") or "bfloat16"
    size = f"{s['model'].rpartition('-')[2].upper()}, {s['resolution']}"
    return [m["device"].removeprefix("NVIDIA ").split()[0], size, f"{linear}, {s['attention_type']}"]


def videos() -> list[str]:
    stages = {"text": "text", "diffusion": "diffusion", "vae": "VAE", "file": "file", "end_to_end": "end to end"}
    int8 = ("t2v_1_3b_480p_int8_sagesla", "t2v_14b_720p_int8_sagesla", "t2v_14b_720p_channel_sagesla")
    return seconds_of_stages(stages, [*(f"h100/{name}" for name in int8), "h200/t2v_1_3b_480p", "h200/t2v_14b_480p"])


def videos_of_images() -> list[str]:
    stages = {name: name for name in ("image", "experts", "diffusion")} | {"vae": "VAE", "end_to_end": "end to end"}
    return seconds_of_stages(stages, ("h100/i2v_a14b_720p_int8_sagesla", "h100/i2v_a14b_720p_24gb"))


def seconds_of_stages(stages: dict[str, str], names: Sequence[str]) -> list[str]:
    """Tabulates the stages of the last, warm call, and the peak of its process."""
    rows = []
    for name in names:
        m = read(name)
        warm = m["result"]["calls"][-1]
        rows.append([*setting(m), *(f"{warm['seconds'].get(stage, 0):.2f}" for stage in stages)])
        rows[-1].append(f"{warm['peak_bytes'] / GB:.1f}")
    return [*table(["GPU", "", "", *stages.values(), "peak, GB"], rows), *sources(names)]


def first_videos() -> list[str]:
    name = "h100/first_video"
    rows = [[cache.removesuffix("_cache"), f"{taken:.1f}"] for cache, taken in read(name)["seconds"].items()]
    return [*table(["compilation cache", "from launch to closed mp4"], rows), *sources([name])]


def diffusion() -> list[str]:
    cases = ("diffusion_1_3b_480p_sla", "diffusion_14b_720p_sla")
    names = [f"{device}/{case}" for device in ("h100", "h200") for case in cases]
    rows = []
    for name in names:
        m = read(name)
        seconds = f"{m['result']['seconds_warm']:.2f}"
        rows.append([*setting(m), seconds, f"{m['result']['peak_bytes'] / GB:.1f}"])
    return [*table(["GPU", "", "", "diffusion, 4 steps", "peak, GB"], rows), *sources(names)]


def linear() -> list[str]:
    schemes = ("block128", "block128_rows", "channel", "block128_weights", "channel_weights")
    rows = []
    for shape, by_scheme in read("h200/linear")["result"].items():
        own = [f"{by_scheme[scheme]['speed_over_bfloat16']:.2f}x" for scheme in schemes]
        rows.append([shape, f"{by_scheme['bfloat16']['ms']:.2f} ms", *own])
    return [*table(["tokens x out x in", "bfloat16", *schemes], rows), *sources(["h200/linear"])]


def linear_rates() -> list[str]:
    rows = []
    for shape, by_scheme in read("h200/linear")["result"].items():
        own = [by_scheme[scheme] for scheme in ("bfloat16", "block128", "channel")]
        rows.append([shape, *(f"{m['ms']:.3f} ms, {m['tops']:.0f}" for m in own)])
        rows[-1] += [f"{m['matmul_tops']:.0f}" for m in own[1:]]
    head = ["tokens x out x in", "bfloat16", "block128", "channel", "block128, matmul", "channel, matmul"]
    return [*table(head, rows), *sources(["h200/linear"])]


def linear_errors() -> list[str]:
    errors: dict[str, list[float]] = {}
    for by_scheme in read("h200/linear")["result"].values():
        for scheme, measured in by_scheme.items():
            errors.setdefault(scheme, []).append(measured["relative_error"])
    rows = [[scheme, f"{min(all_):.1e} to {max(all_):.1e}"] for scheme, all_ in errors.items()]
    return [*table(["", "relative error"], rows), *sources(["h200/linear"])]


def attention() -> list[str]:
    sla = {"sla_mosaic_ms": "sla, Hopper", "sla_triton_ms": "sla, Triton"}
    names = {"dense_ms": "dense", **sla, "sagesla_ms": "sagesla"}
    rows = []
    for shape, measured in read("h200/attention")["result"].items():
        if "dense_ms" in measured:
            rows.append([shape, *(f"{measured[name]:.2f}" for name in names)])
    return [*table(["heads x tokens", *names.values()], rows), *sources(["h200/attention"])]


def attention_over_peers() -> list[str]:
    """Tabulates speed over TurboDiffusion, which was measured on an H100, also where no tile's scores are bounded."""
    names = {
        "sla_mosaic": "sla, Hopper",
        "sla_mosaic_long_key": "with a long key",
        "sla_triton": "sla, Triton",
        "sla_triton_long_key": "with a long key",
        "sagesla": "sagesla",
    }
    theirs = {peer.place: peer.value for peer in peers() if peer.case == "attention"}
    rows = []
    for shape, measured in read("h200/attention")["result"].items():
        if "dense_ms" in measured:
            rows.append([shape])
            for name in names:
                peer = theirs[f"{shape} / {name.removesuffix('_long_key')}_ms"]
                rows[-1].append(f"{measured[f'{name}_ms']:.2f} ({peer / measured[f'{name}_ms']:.2f}x)")
    return [*table(["heads x tokens", *names.values()], rows), *sources(["h200/attention"])]


def training() -> list[str]:
    names = ("h100/train_step_sla", "h100/train_step_scm", "h200/train_step_scm")
    rows = []
    for name in names:
        result = read(name)["result"]
        fraction = f"{result['model_flops_utilisation']:.2f}"
        device, _, recipe = name.partition("/train_step_")
        rows.append([recipe, device.upper(), f"{result['seconds']:.2f}", f"{result['peak_bytes'] / GB:.1f}", fraction])
    head = ["recipe", "GPU", "seconds", "peak, GB", "fraction of the bfloat16 rate"]
    return [*table(head, rows), *sources(names)]


def memory_analysis() -> list[str]:
    """Tabulates XLA's analysis of compiled programs beside the estimates, in GB."""
    name = "ahead_of_time/memory"
    rows = []
    for case, result in read(name)["result"].items():
        cells = [result[how][stage] for how, stage in ANALYSED]
        gigabytes = [f"{cell['analysis'] / GB:.2f} / {cell['estimate'] / GB:.2f}" for cell in cells]
        network, *how = case.removeprefix("wan2.1-t2v-").split()
        rows.append([", ".join([network.upper(), *how]), *gigabytes])
    return [*table(["analysis / estimate", *ANALYSED.values()], rows), *sources([name])]


ANALYSED = {
    ("resident", "diffusion"): "diffusion, resident",
    ("streamed", "diffusion"): "diffusion, streamed",
    ("resident", "vae"): "VAE",
    ("streamed", "vae"): "VAE in tiles",
}


def memory_peaks() -> list[str]:
    """Tabulates the largest stage of each measurement, predicted and measured, in GB."""
    names = sorted(f"{path.parent.name}/{path.stem}" for path in BENCHMARKS.glob("h?00/memory_*.json"))
    rows = []
    for name in names:
        m = read(name)
        stages = m["result"]["stages"].values()
        measured = max(stages, key=lambda stage: stage["measured_bytes"])
        predicted = max(stage["predicted_bytes"] for stage in stages) / GB
        limit = m["result"]["limit_bytes"] / GB
        saved = ", ".join(SAVED[saving] for saving, taken in m["result"]["residency"].items() if taken)
        rows.append([*setting(m), f"{limit:.1f}", saved, f"{predicted:.2f}", f"{measured['measured_bytes'] / GB:.2f}"])
        rows[-1].append(f"`{name}.json`")
    return table(["GPU", "", "", "limit", "offloaded, or in tiles", "predicted", "measured", ""], rows)


SAVED = {  # as the files of 2026-11 name savings
    "idle_in_host": "what is idle",
    "text_streamed": "text encoder",
    "vae_tiled": "VAE in tiles",
    "in_turn": "an expert",
    "transformer_streamed": "transformer",
}


def vae_chunks() -> list[str]:
    name = "h200/vae_480p"
    rows = []
    for way, measured in read(name)["result"].items():
        if isinstance(measured, dict):
            peaks = [measured.get(f"peak_bytes_{latents}_latents") for latents in (21, 41)]
            rows.append([way.replace("_", " "), f"{measured['seconds_81_frames_to_host']:.2f}"])
            rows[-1] += [f"{peak / GB:.2f}" if peak else "" for peak in peaks]
            difference = measured.get("max_difference_over_range")
            rows[-1].append("" if difference is None else f"{difference:.1e}")
    head = ["latents a chunk", "seconds", "peak of 21, GB", "peak of 41, GB", "difference, of the range"]
    return [*table(head, rows), *sources([name])]


def video_files() -> list[str]:
    """Tabulates settings of x264, of drawn shapes and of noise, which random weights make."""
    name = "cpu/video_file"
    result = {case: measured for case, measured in read(name)["result"].items() if isinstance(measured, dict)}
    rows = []
    for case, shapes in result.items():
        if not case.startswith("shapes "):
            continue
        both = [shapes, result[case.replace("shapes", "noise")]]
        rows.append([case.removeprefix("shapes "), *(" / ".join(f"{m[k]:.1f}" for m in both) for k in WRITING)])
        rows[-1].append(" / ".join(f"{m['bytes'] / 1e6:.1f}" for m in both))
    return [*table(["shapes / noise", *WRITING.values(), "MB"], rows), *sources([name])]


WRITING = {"processor_seconds": "processor s", "seconds": "s", "tail_seconds": "tail s", "psnr": "PSNR of luma, dB"}


def measurements() -> list[str]:
    """Tabulates all files of benchmarks/ with the pages that quote them."""
    root = DOCS.parent
    pages = {page: page.read_text(encoding="utf-8") for page in (root / "README.md", CARD, *sorted(DOCS.rglob("*.md")))}
    rows = []
    for path in sorted(path for path in BENCHMARKS.rglob("*") if path.suffix in (".json", ".safetensors")):
        name = path.relative_to(BENCHMARKS).as_posix()
        quoting = [page.relative_to(root).as_posix() for page, text in pages.items() if f"{name}`" in text]
        rows.append([f"[{name}]({name})", ", ".join(f"[{page}](../{page})" for page in quoting)])
    return table(["file", "quoted by"], rows)


TABLES: dict[str, Callable[[], list[str]]] = {
    "GPUs, 0.75": lambda: gpus(0.75),
    "GPUs, 0.9": lambda: gpus(0.9),
    "videos": videos,
    "videos of images": videos_of_images,
    "first videos": first_videos,
    "diffusion": diffusion,
    "linear": linear,
    "linear, rates": linear_rates,
    "linear, errors": linear_errors,
    "attention": attention,
    "attention over peers": attention_over_peers,
    "training": training,
    "memory, analysis": memory_analysis,
    "memory, peaks": memory_peaks,
    "VAE, chunks": vae_chunks,
    "video files": video_files,
    "measurements": measurements,
}
MARKED = re.compile(r"(<!-- table: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def renewed(page: str) -> str:
    """Returns a page with its tables as they are to be."""
    return MARKED.sub(lambda mark: "\n".join([mark[1], *TABLES[mark[2]](), "", mark[3]]), page)


def main() -> None:
    for path in (*DOCS.rglob("*.md"), BENCHMARKS / "README.md"):
        page = path.read_text(encoding="utf-8")
        if (new := renewed(page)) != page:
            path.write_text(new, encoding="utf-8")
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
