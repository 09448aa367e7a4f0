"""Training on any machine, without a download: a tiny network learns generated latents on a CPU in about a minute.

    python scripts/train.py --config=configs/train_toy.py
    python scripts/train.py --config=configs/train_toy.py:sla
    python scripts/train.py --config=configs/train_toy.py:rcm

The first trains a teacher, which the other two start from and learn from. Expect its loss to fall from above 3 to below
0.8 and that of sla from 0.07 to 0.05; rcm takes longer, and its losses tell little by themselves. Results are in
outputs/train_toy/. Videos of what it makes come with --config.sample_every=100 --config.vae=demo.
"""

from turbojax.train.config import FEW_STEPS, train_config

TEACHER = "outputs/train_toy/teacher/transformer.safetensors"


def get_config(recipe: str = "teacher"):
    config = train_config(
        recipe=recipe,
        workdir=f"outputs/train_toy/{recipe}",
        data="toy",
        weights="random" if recipe == "teacher" else TEACHER,
        model="toy",
        sla_topk=0.25,
        sla_blocks=(8, 8),
        num_steps=200,
        batch_size=16,
        accumulation=1,
        dtype="float32",
        remat=False,
        learning_rate=3e-3,
        beta2=0.99,
        warmup_steps=20,
        time_mean=1.0,
        checkpoint_every=100,
        sampler="euler",
        num_inference_steps=20,
        sample_guidance=2.0,
    )
    if recipe == "rcm":
        config.update(learning_rate=2e-4, critic_learning_rate=1e-3, beta1=0.0, time_mean=0.7, guidance_scale=2.0)
        config.update(tangent_warmup=0, student_every=2, matching_scale=3.0)
        config.update(FEW_STEPS)
    return config
