"""Fine-tuning: a network learns from data, then sparse-linear attention (SLA) learns from that network.

    python examples/fine_tuning.py

Trains a toy on generated latents, on any machine, in about a minute. For your own videos see docs/training-data.md:
data="data" and weights="Wan-AI/Wan2.1-T2V-1.3B" in place of what is here, with attention_type and sla_topk as below.
A run that was stopped goes on from its newest checkpoint.
"""

from pathlib import Path

from turbojax.train.config import train_config
from turbojax.train.loop import train


def main(folder: str = "outputs/examples", num_steps: int = 200) -> Path:
    common = {"data": "toy", "model": "toy", "num_steps": num_steps, "batch_size": 16, "dtype": "float32"}
    common |= {"accumulation": 1, "remat": False, "warmup_steps": 1 + num_steps // 10}
    teacher = train(
        train_config(recipe="teacher", workdir=f"{folder}/teacher", weights="random", learning_rate=3e-3, **common)
    )
    sparse = train(
        train_config(
            recipe="sla",
            workdir=f"{folder}/sla",
            weights=str(teacher),
            teacher=str(teacher),
            sla_topk=0.25,
            sla_blocks=(8, 8),
            **common,
        )
    )
    print("the dense network:", teacher)
    print("the sparse one, for --config.weights= and merging:", sparse)
    return sparse


if __name__ == "__main__":
    main()
