"""Measurements as a table for people, with the peers' figures beside them where the GPU is the same.

print(report(json.loads(Path("benchmarks/h100/attention.json").read_text())))
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

PEERS_GPU = "NVIDIA H100 80GB HBM3"
LAYER_COLUMNS = ("ms", "floor_ms", "fraction", "bytes", "what")  # of one kernel in the case layer


class Peer(NamedTuple):
    """Another system's figure: its case and settings, and the figure's place in the result."""

    system: str
    case: str
    settings: dict[str, Any]
    place: str
    value: float


def peers() -> list[Peer]:
    """Returns figures of the public repositories on one H100: PyTorch 2.11, CUDA 13.0, random weights, batch 1."""
    rows = []
    attention = {  # heads x tokens, topk: cuDNN, TurboDiffusion's SLA and SageSLA, ms
        "12 x 32760, topk 0.1": (11.2, 2.80, 2.75),
        "12 x 32760, topk 0.15": (11.2, 3.46, 3.13),
        "40 x 32760, topk 0.1": (37.2, 8.56, 8.48),
        "40 x 75600, topk 0.1": (204, 34.3, 28.0),
        "40 x 75600, topk 0.15": (204, 46.8, 36.4),
    }
    for shape, (dense, sla, sage) in attention.items():
        rows.append(Peer("cuDNN", "attention", {}, f"{shape} / dense_ms", dense))
        for kernel in ("mosaic", "triton"):
            rows.append(Peer("TurboDiffusion", "attention", {}, f"{shape} / sla_{kernel}_ms", sla))
        rows.append(Peer("TurboDiffusion", "attention", {}, f"{shape} / sagesla_ms", sage))
    linear = {  # rows x out x in: TurboDiffusion's full layer, cuBLAS in bfloat16, TOPS
        "32768 x 1536 x 1536": (279, 706),
        "32768 x 8960 x 1536": (328, 670),
        "32768 x 1536 x 8960": (347, 775),
        "75648 x 5120 x 5120": (385, 699),
        "75648 x 13824 x 5120": (398, 697),
        "75648 x 5120 x 13824": (406, 701),
    }
    for shape, (block128, bfloat16) in linear.items():
        rows.append(Peer("TurboDiffusion", "linear", {}, f"{shape} / block128 / tops", block128))
        rows.append(Peer("cuBLAS", "linear", {}, f"{shape} / bfloat16 / tops", bfloat16))
    small = {"model": "wan2.1-t2v-1.3b", "resolution": "480p"}
    large = {"model": "wan2.1-t2v-14b", "resolution": "720p"}
    seconds = {("sla", None): (1.55, 23.3), ("sagesla", None): (1.55, 22.5), ("sagesla", "block128"): (2.09, 28.1)}
    for case, place in (("diffusion", "seconds_warm"), ("text_to_video", "warm / seconds / diffusion")):
        for (attention_type, scheme), values in seconds.items():  # diffusion in 4 steps of 81 frames
            call = {
                "attention_type": attention_type,
                "quant_scheme": scheme,
                "num_frames": 81,
                "num_inference_steps": 4,
            }
            for network, value in zip((small, large), values, strict=True):
                rows.append(Peer("TurboDiffusion", case, network | call, place, value))
    for resolution, decoding in (("480p", 1.86), ("720p", 4.22)):
        size = {"resolution": resolution, "num_frames": 81}
        rows.append(Peer("PyTorch", "text_to_video", size, "warm / seconds / vae", decoding))
        rows.append(Peer("PyTorch", "vae", size, "chunk_1 / seconds_81_frames_to_host", decoding))
    return rows


def report(measurement: Mapping[str, Any]) -> str:
    """Returns a table of what `scripts/benchmark.py` writes: device, case, settings and result."""
    known: dict[str, Peer] = {}
    if measurement["device"] == PEERS_GPU:
        settings = measurement["settings"]
        for peer in peers():
            if peer.case == measurement["case"] and peer.settings.items() <= settings.items():
                known[peer.place] = peer
    lines = [f"{measurement['case']} on {measurement['device']}, {measurement['date']}"]
    rows = list(leaves(measurement["result"]))
    width = max((len(place) for place, _ in rows), default=0)
    for place, value in rows:
        line = f"  {place:{width}}  {written(value):>10}"
        if place in known:
            line += f"   {known[place].system} {written(known[place].value)} ({advantage(place, value, known[place])})"
        lines.append(line)
    for kernel in measurement["result"].get("kernels", ()):
        lines.append("  " + "  ".join(f"{written(kernel[name]):>10}" for name in LAYER_COLUMNS))
    return "\n".join(lines)


def advantage(place: str, ours: float, peer: Peer) -> str:
    """Returns how many times as fast ours is: of rates more is better, of times less."""
    return f"{ours / peer.value if place.endswith('tops') else peer.value / ours:.2f}x"


def leaves(result: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yields every figure with its place; of several calls the last of each name."""
    for name, value in result.items():
        if name == "calls":
            yield from leaves({call["call"]: {k: v for k, v in call.items() if k != "call"} for call in value}, above)
        elif isinstance(value, Mapping):
            yield from leaves(value, (*above, name))
        elif not isinstance(value, list):
            yield " / ".join((*above, name)), value


def written(value: Any) -> str:
    """Formats a figure: 4 digits, large whole numbers as GB."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**7:
        return f"{value / 1e9:.2f} GB"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
