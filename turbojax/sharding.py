"""Parameters, optimizer state, samples and tokens over many devices and hosts.

A mesh has three axes: "data" (samples), "fsdp" (samples, too, and parameters with all that belongs to them) and
"sequence" (tokens). It is created by `make_mesh` and put in force by `jax.set_mesh`:

    with jax.set_mesh(make_mesh(data=2, fsdp=2, sequence=2)):
        state = jax.jit(init, out_shardings=state_shardings(jax.eval_shape(init, key)))(key)
        state = step(state, put_batch(batch))  # a jitted function whose result goes through `as_sharded`

Everything here does nothing without a mesh, or on one of one device. The transformer's layers run under `jax.shard_map`
and not by XLA's partitioner, which can split neither our kernels nor, along the tokens, cuDNN's attention.

B batch, L tokens, N heads, H head dim.
"""

import functools
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import logging
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from turbojax.errors import UserError

DATA, FSDP, SEQUENCE = AXES = ("data", "fsdp", "sequence")

# The first pattern that matches a parameter's whole dotted path says from which axis on it may be split over fsdp.
RULES: tuple[tuple[str, int | None], ...] = (
    (r"(.+\.)?(bias|scale|modulation)|.*norm\w*\.weight|.*\.proj_l\.weight", None),  # small: not worth a message
    (r"(.+\.)?blocks\..+", 1),  # the first axis counts the layers
    (r".*", 0),
)


def initialize_distributed(
    coordinator: str | None = None, *, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes on several hosts, after which `jax.devices()` are those of all; call before JAX is used.

    coordinator: address and port of process 0. Without, the environment decides: JAX_COORDINATOR_ADDRESS (with
    JAX_NUM_PROCESSES and JAX_PROCESS_ID), or a launch of several processes by Slurm's srun or Open MPI's mpirun.
    Where it names nothing this does nothing. Raises UserError where the processes cannot be joined.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    launched = max(environment_number(name) or 1 for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    if coordinator is None and launched == 1:
        return
    if num_processes is None:
        num_processes = environment_number("JAX_NUM_PROCESSES")
    if process_id is None:
        process_id = environment_number("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (ValueError, RuntimeError) as error:
        given = f"{coordinator=}, {num_processes=}, {process_id=}"
        raise UserError(f"the processes cannot be joined: {error} ({given})") from error


def environment_number(name: str) -> int | None:
    value = os.environ.get(name)
    if value is not None and not value.isdigit():
        raise UserError(f"{name}={value} in the environment must be a number")
    return None if value is None else int(value)


def make_mesh(*, data: int = -1, fsdp: int = 1, sequence: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices (or those given) of these sizes; -1, at most once, takes the rest.

    Neighbours along the sequence are neighbours on a host. Raises UserError for sizes that do not fit.
    """
    count = len(devices) if devices is not None else jax.device_count()
    sizes = [data, fsdp, sequence]
    shown = f"{data=} x {fsdp=} x {sequence=}"
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"a mesh of {shown} cannot be; sizes are at least 1, or once -1 for the rest of the devices")
    if -1 in sizes:
        sizes[sizes.index(-1)] = count // math.prod(size for size in sizes if size != -1)
    if math.prod(sizes) != count:
        raise UserError(f"a mesh of {shown} does not fill {count} devices; choose sizes whose product is {count}")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def axis_size(name: str) -> int:
    """Devices along an axis of the mesh in force; 1 without."""
    return jax.sharding.get_abstract_mesh().shape.get(name, 1)


# Parameters and batches.


def parameter_spec(name: str, shape: tuple[int, ...]) -> P:
    """How RULES split a parameter, and what belongs to it: over fsdp along the largest axis that divides.

    name: dotted path, with anything in front. Where no axis divides, it stays whole.
    """
    first = next(first for pattern, first in RULES if re.fullmatch(pattern, name))
    size = axis_size(FSDP)
    if size == 1 or first is None or len(shape) <= first:
        return P()
    suitable = [axis for axis in range(first, len(shape)) if shape[axis] % size == 0]
    if not suitable:
        logging.debug("%s %s stays whole: no axis divides over fsdp=%d", name, shape, size)
        return P()
    largest = max(suitable, key=lambda axis: shape[axis])
    return P(*(FSDP if axis == largest else None for axis in range(largest + 1)))


def parameter_specs(state: Any) -> Any:
    """`parameter_spec` of each array in a pytree."""

    def spec(path: tuple, leaf: Any) -> P:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return parameter_spec(name.removesuffix(".value"), leaf.shape)

    return jax.tree_util.tree_map_with_path(spec, state)


def state_shardings(state: Any) -> Any:
    """NamedShardings of a whole training state: parameters, averages, moments, scalars; None without a mesh.

    state: arrays or shapes. What belongs to a parameter has its path as the end of its own, and is split like it.
    """
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else jax.tree.map(functools.partial(NamedSharding, mesh), parameter_specs(state))


def as_sharded(state: Any) -> Any:
    """Inside `jax.jit`: the same arrays, split as `state_shardings` says and not as XLA would choose."""
    if jax.sharding.get_abstract_mesh().empty:
        return state
    return lax.with_sharding_constraint(state, parameter_specs(state))


def batch_share() -> tuple[int, int]:
    """(i, n): this process reads the i-th of n equal shares of each batch; (0, 1) without a mesh.

    Processes that share samples, because the sequence goes over several hosts, have the same i.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return 0, 1
    rows = mesh.devices.reshape(-1, mesh.shape[SEQUENCE])
    mine = [i for i, row in enumerate(rows) if any(device.process_index == jax.process_index() for device in row)]
    return mine[0] // len(mine), len(rows) // len(mine)


def put_batch(batch: Any) -> Any:
    """This process' share of a batch, host arrays `[B / n, ...]`, as arrays `[B, ...]` with samples over data and fsdp.

    Raises UserError for a B that does not divide. Without a mesh the arrays go to the device as they are.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.device_put(batch)
    sharding = NamedSharding(mesh, P((DATA, FSDP)))
    shares = batch_share()[1]

    def put(array: Any) -> jax.Array:
        size = len(array) * shares
        if batch_axes(size) is None:
            data, fsdp = axis_size(DATA), axis_size(FSDP)
            raise UserError(
                f"a batch of {size} does not divide over {data=} x {fsdp=}; take a multiple of {data * fsdp}"
            )
        return jax.make_array_from_process_local_data(sharding, array, (size, *array.shape[1:]))

    return jax.tree.map(put, batch)


# The transformer's layers.


def batch_axes(size: int) -> tuple[str, ...] | None:
    """The axes that samples are split over; None where they do not divide, and every device has all of them."""
    return (DATA, FSDP) if size % (axis_size(DATA) * axis_size(FSDP)) == 0 else None


def scan_layers(
    run_layer: Callable[[Any, jax.Array, Any, Any, Any], jax.Array],
    layers: Any,
    x: jax.Array,
    per_layer: Any,
    per_sample: Any,
    per_token: Any,
    *,
    remat: bool = False,
) -> jax.Array:
    """x `[B, L, D]` through all layers, by one scan.

    run_layer(layer, x, per_layer, per_sample, per_token): the next x. layers: parameters of blocks, `[layers, ...]`;
    per_layer, per_sample, per_token: pytrees of arrays `[layers, B, ...]`, `[B, ...]` and `[L, ...]`.
    remat: whether gradients compute each layer a second time; over a mesh they always do.

    Over a mesh, `run_layer` sees what one device has: its samples (all, where B does not divide) and its tokens. A
    layer's parameters are gathered over fsdp when it is their turn, here and again for the gradients, which go back in
    parts. Raises UserError for an L that does not divide.
    """
    specs = parameter_specs({"blocks": layers})["blocks"]
    over_mesh = any(axis_size(name) > 1 for name in AXES)

    def run(layers: Any, x: jax.Array, per_layer: Any, per_sample: Any, per_token: Any) -> jax.Array:
        def step(x: jax.Array, layer: tuple[Any, Any]) -> tuple[jax.Array, None]:
            parameters, own = layer
            return run_layer(jax.tree.map(gather, parameters, specs), x, own, per_sample, per_token), None

        # Or all layers' gathered parameters are kept; and jax 0.11's compiler crashes where what gradients need of
        # cuDNN's attention is kept by a scan over a mesh.
        if remat or over_mesh:
            step = jax.checkpoint(step, prevent_cse=False)
        return lax.scan(step, x, (layers, per_layer))[0]

    if not over_mesh:
        return run(layers, x, per_layer, per_sample, per_token)
    if x.shape[1] % (size := axis_size(SEQUENCE)):
        fewer = max(n for n in range(1, size) if x.shape[1] % n == 0)
        raise UserError(
            f"{x.shape[1]} tokens do not divide over sequence={size}; take sequence={fewer} or another size"
        )
    samples = batch_axes(x.shape[0])
    in_specs = (specs, P(samples, SEQUENCE), P(None, samples), P(samples), P(SEQUENCE))
    run = jax.shard_map(run, in_specs=in_specs, out_specs=P(samples, SEQUENCE), check_vma=False)
    return run(layers, x, per_layer, per_sample, per_token)


def gather(part: jax.Array, spec: P) -> jax.Array:
    """A layer's whole parameter from the devices' parts; spec: that of the stacked one."""
    return lax.all_gather(part, FSDP, axis=spec.index(FSDP) - 1, tiled=True) if FSDP in spec else part


def over_heads(attend: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """attend(q, k, v), each with some tokens of all heads, by attention over all tokens of some heads.

    arrays: `[B, L / sequence, N, H]`, and the result likewise; `attend` gets and gives `[B, L, N / sequence, H]` by
    all-to-all exchanges (DeepSpeed Ulysses, arXiv 2309.14509). Outside `scan_layers` there is nothing to exchange.
    Raises UserError for an N that does not divide.
    """
    size, heads = axis_size(SEQUENCE), arrays[0].shape[2]
    if size == 1 or SEQUENCE not in jax.sharding.get_abstract_mesh().manual_axes:
        return attend(*arrays)
    if heads % size:
        possible = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(f"{heads} heads do not divide over sequence={size}; take one of {possible}")
    exchange = functools.partial(lax.all_to_all, axis_name=SEQUENCE, tiled=True)
    out = attend(*(exchange(array, split_axis=2, concat_axis=1) for array in arrays))
    return exchange(out, split_axis=1, concat_axis=2)
