"""One of two processes with 4 simulated devices each, as on two hosts: two layers and their gradient over all 8.

Run by test_sharding.py with JAX_COORDINATOR_ADDRESS and the like; writes what came out to stdout as JSON.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np

from turbojax import sharding


def weights() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 8, 8), np.float32)


def samples() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((4, 6, 8), np.float32)


def loss(layers: dict, x: jax.Array) -> jax.Array:
    def run_layer(layer, x, per_layer, per_sample, per_token):
        return jnp.tanh(x @ layer["weight"])

    return jnp.mean(sharding.scan_layers(run_layer, layers, x, None, None, None) ** 2)


def main() -> None:
    sharding.initialize_distributed()
    mesh = sharding.make_mesh(data=2, fsdp=2, sequence=2)
    with jax.set_mesh(mesh):
        shardings = sharding.state_shardings({"blocks": {"weight": weights()}})["blocks"]
        layers = jax.jit(lambda: {"weight": jnp.asarray(weights())}, out_shardings=shardings)()
        share, shares = sharding.batch_share()
        batch = sharding.put_batch(np.split(samples(), shares)[share])
        whole = jax.NamedSharding(mesh, jax.P())
        value, gradient = jax.jit(jax.value_and_grad(loss), out_shardings=whole)(layers, batch)
        result = {
            "share": [share, shares],
            "held": [part.data.shape for array in (layers["weight"], batch) for part in array.addressable_shards],
            "loss": float(value),
            "gradient": np.asarray(gradient["weight"]).tolist(),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
