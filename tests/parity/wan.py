"""Recomputes the fixtures of the transformer: wan21_t2v*, wan21_official, wan22_i2v, wan21_i2v_clip."""

import dataclasses
import re
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
import numpy as np

from tests.parity.sla import as_map
from turbojax.kernels import norms, sla
from turbojax.models import layers, wan
from turbojax.weights.load import WanModel, build_wan, check_wan
from turbojax.weights.options import NetworkOptions

# Absolute tolerances of a float32 network against the recorded values; other keys get 1e-5 of their largest value.
TOLERANCES = (
    (r"out\.x.*|out\.block\d+|out\.block\d+\.(self_attn|cross_attn|ffn|norm\d)", 5e-5),
    (r"out\.block\d+\.sparse_map", 0.0),
    (r"out\.patch_embedding.*|out\.time_sinusoid|out\.e0?", 2e-6),
    (r"out\.rope_angles", 1e-5),
    (r"out\.text_embedding", 5e-6),
    (r"out\.img_emb", 2e-5),
)


def build(config: dict, t: dict[str, np.ndarray], *, prefix: str = "w.", dtype: Any = jnp.float32) -> WanModel:
    """The network whose weights are the keys with this prefix."""
    weights = {name.removeprefix(prefix): value for name, value in t.items() if name.startswith(prefix)}
    checkpoint = check_wan(weights, num_heads=config["args"]["num_heads"], what="fixture")
    # Recorded with fewer rows of text than 512, and none left out.
    changes = {"text_len": t["in.text"].shape[1] if "in.text" in t else config["args"]["text_len"]}
    if checkpoint.config.attention_type == "sla":
        sparse = config.get("SparseLinearAttention") or config["attention"]["SparseLinearAttention"]
        changes |= {"sla_topk": sparse["topk"], "sla_blocks": (sparse["BLKQ"], sparse["BLKK"])}
    checkpoint = checkpoint._replace(config=dataclasses.replace(checkpoint.config, **changes))
    return build_wan(checkpoint, NetworkOptions(dtype=dtype))


def channels_last(x: np.ndarray) -> jnp.ndarray:
    return jnp.asarray(np.moveaxis(x, -4, -1))


def channels_first(x) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, -4)


def inputs(t: dict[str, np.ndarray]) -> dict:
    """The network's arguments."""
    return {
        "x": channels_last(t["in.x"]),
        "timesteps": jnp.asarray(t["in.t"].reshape(len(t["in.x"]))),
        "text": jnp.asarray(t["in.text"]),
        "y": channels_last(t["in.y"]) if "in.y" in t else None,
        "clip": jnp.asarray(t["in.clip"]) if "in.clip" in t else None,
    }


def recompute(config: dict, t: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, float]]:
    """Every `out.*` key with our own value and its absolute tolerance."""
    model = build(config, t)
    members = {int(found[1]) for name in t if (found := re.match(r"out\.block(\d+)\.", name))}
    if "in.x.0" in t:
        values = official_values(model, config, t)
    else:
        values = intermediate_values(model, inputs(t), members=members)
    return {name: (np.asarray(values[name]), tolerance(name, t[name])) for name in t if name in values}


def official_values(model: WanModel, config: dict, t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The official form: lists of clips and of unpadded texts, one network call each, results stacked by name."""
    values = rope_table(model.config.head_dim, len(t["out.rope_table_cos"]))
    clips = []
    for i, tokens in enumerate(config["tokens"]):
        context = t[f"in.context.{i}"]
        text = np.pad(context, ((0, config["args"]["text_len"] - len(context)), (0, 0)))
        x, timesteps = channels_last(t[f"in.x.{i}"][None]), jnp.asarray(t["in.t"][i : i + 1])
        clip = intermediate_values(model, {"x": x, "timesteps": timesteps, "text": jnp.asarray(text)[None]})
        for name in ("out.x", "out.patch_embedding"):
            values[f"{name}.{i}"] = clip.pop(name)[0]
        for name in [n for n in clip if re.fullmatch(r"out\.block\d+", n)]:
            # Rows past a clip's own tokens are padding, which we do not compute: there is nothing to compare.
            clip[name] = np.concatenate((clip[name], t[name][i : i + 1, tokens:]), axis=1)
        clips.append(clip)
    return values | {name: np.concatenate([clip[name] for clip in clips]) for name in clips[0] if name in t}


def tolerance(name: str, expected: np.ndarray) -> float:
    for pattern, value in TOLERANCES:
        if re.fullmatch(pattern, name):
            return value
    return 1e-5 * float(np.abs(expected).max())


def intermediate_values(model: WanModel, args: dict, *, members: Collection[int] = ()) -> dict[str, np.ndarray]:
    """The network's result, and those of its parts called one after the other; compiled at once, to save time.

    members: the blocks whose members' results are wanted, too.
    """
    graph, state = wan.nnx.split(model)
    values = wan.jax.jit(lambda state, args: parts(wan.nnx.merge(graph, state), args, members))(state, args)
    return {name: np.asarray(value) for name, value in values.items()} | {"out.x": channels_first(values["out.x"])}


def parts(model: WanModel, args: dict, members: Collection[int] = ()) -> dict[str, wan.jax.Array]:
    c = model.config
    out = {"out.x": model(**args)}
    x, y, clip = args["x"], args.get("y"), args.get("clip")
    x = x if y is None else jnp.concatenate((x, y), axis=-1)
    grid = wan.patch_grid(x, c.patch)
    tokens = out["out.patch_embedding"] = model.patch_embedding(wan.patchify(x, c.patch))
    out["out.time_sinusoid"] = layers.time_sinusoid(args["timesteps"], c.freq_dim)
    out["out.e"], e0 = model.embed_time(args["timesteps"])
    out["out.e0"] = e0
    out["out.text_embedding"] = model.text_embedding(args["text"])
    if clip is not None:
        out["out.img_emb"] = model.image_embedding(clip)
    context = model.prepare(args["text"], grid, clip=clip)
    pairs = layers.rotary_pairs(c.head_dim)
    angles = [layers.rotary_angles(size, n) for size, n in zip(grid, pairs, strict=True)]
    out["out.rope_angles"] = layers.over_tokens(angles, grid)
    out["out.rope_cos"], out["out.rope_sin"] = context.table
    graph, stacked = wan.nnx.split(model.blocks)
    for i in range(c.num_layers):
        block, text, image = wan.jax.tree.map(lambda a, i=i: a[i], (stacked, context.text, context.image))
        block, own = wan.nnx.merge(graph, block), wan.Context(text, image, context.table)
        if i in members:
            out |= {f"out.block{i}.{name}": value for name, value in block_values(block, tokens, e0, own).items()}
        if c.attention_type == "sla":
            out |= {f"out.block{i}.{k}": v for k, v in block_map(block, tokens, e0, context.table).items()}
        tokens = out[f"out.block{i}"] = block(tokens, e0, *own)
    return out


def block_values(block: wan.Block, x, e0, context: wan.Context) -> dict:
    """The members of one block, in the order in which the block calls them."""
    shift1, scale1, gate1, shift2, scale2, _ = wan.modulation(block.modulation[...], e0)
    out = {"norm1": norms.layer_norm(x, eps=block.eps)}
    h = norms.modulated_norm(x, 1 + scale1, shift1, eps=block.eps)
    out["self_attn"] = block.self_attn(h, context.table)
    x = norms.Residual(x, gate1).plus(out["self_attn"])
    out["norm3"] = block.norm3(x)
    out["cross_attn"] = block.cross_attn(out["norm3"], context.text, context.image)
    x = x + out["cross_attn"]
    out["norm2"] = norms.layer_norm(x, eps=block.eps)
    out["ffn"] = block.ffn(norms.modulated_norm(x, 1 + scale2, shift2, eps=block.eps))
    return out


def block_map(block: wan.Block, x, e0, table) -> dict:
    """SLA's pooled scores and the chosen blocks as a 0 / 1 map."""
    attn, c = block.self_attn, block.self_attn.config
    shift, scale, *_ = wan.modulation(block.modulation[...], e0)
    h = norms.modulated_norm(x, 1 + scale, shift, eps=block.eps)
    q, k = attn.norm_q.rotated(attn.q(h), table), attn.norm_k.rotated(attn.k(h), table)
    blocks = {"block_q": c.blocks[0], "block_k": c.blocks[1]}
    scores = sla.reference.pooled_scores(q, k, **blocks)
    chosen = sla.block_table(q, k, topk=c.sla_topk, **blocks)
    return {"pooled_score": scores, "sparse_map": as_map(chosen, scores.shape[-1])}


def rope_table(head_dim: int, positions: int) -> dict[str, np.ndarray]:
    """cos and sin of the first positions of every axis, columns time, height, width."""
    angles = np.concatenate([layers.rotary_angles(positions, n) for n in layers.rotary_pairs(head_dim)], axis=1)
    return {"out.rope_table_cos": np.cos(angles), "out.rope_table_sin": np.sin(angles)}
