"""Tables of measurements that were made, with the peers' figures where the card is theirs."""

import json
import re
from pathlib import Path

import pytest

from turbojax.bench.report import report

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def measurement(name: str) -> dict:
    return json.loads((BENCHMARKS / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("name", "place", "peer"),
    [
        ("h100/attention", "12 x 32760, topk 0.1 / sagesla_ms", "TurboDiffusion 2.75"),
        ("h100/attention", "40 x 75600, topk 0.1 / dense_ms", "cuDNN 204"),
        ("h100/t2v_14b_720p_int8_sagesla", "warm / seconds / diffusion", "TurboDiffusion 28.1"),
        ("h100/t2v_14b_720p_int8_sagesla", "warm / seconds / vae", "PyTorch 4.22"),
        ("h100/diffusion_1_3b_480p_sla", "seconds_warm", "TurboDiffusion 1.55"),
    ],
)
def test_peers_stand_beside_ours_on_their_card(name, place, peer):
    (line,) = [line for line in report(measurement(name)).splitlines() if line.strip().startswith(place + " ")]
    found = re.search(rf"([\d.]+)(?: s)?\s+{peer} \(([\d.]+)x\)$", line)
    assert found, line
    ours, ratio = map(float, found.groups())
    assert abs(ratio - float(peer.split()[1]) / ours) < 0.01


def test_no_peers_beside_another_card():
    assert "TurboDiffusion" not in report(measurement("h200/linear"))
    on_theirs = report(measurement("h200/linear") | {"device": "NVIDIA H100 80GB HBM3"})
    assert on_theirs.count("TurboDiffusion") == 6


def test_no_peers_beside_other_settings():
    other = measurement("h100/t2v_14b_720p_int8_sagesla")
    other["settings"]["num_inference_steps"] = 2
    assert "TurboDiffusion" not in report(other)


def test_kernels_of_a_layer_are_listed():
    lines = report(measurement("h100/layer_14b_720p_block128_sagesla")).splitlines()
    assert "sage_forward_kernel" in next(line for line in lines if "18.95" in line)
