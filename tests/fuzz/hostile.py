"""Files that were thought of rather than drawn: each asks for time, memory or trust that its size does not warrant."""

import json
import struct
from collections.abc import Iterator

import numpy as np

from tests.fuzz.files import (
    CONFIGURATION,
    networks,
    pickle_of,
    plain_pickle,
    shards,
    to_safetensors,
    with_length,
    zipped,
)

Files = dict[str, bytes]


def nested_tuples(levels: int) -> bytes:
    """A tuple of ten tuples of ten ..., each level one object: 10 ** levels items if they are written out."""
    program = plain_pickle("laugh") + b"\x85q\x00"
    for level in range(levels):
        program += b"(" + (b"h" + bytes([level])) * 10 + b"tq" + bytes([level + 1])
    return program


def tensor(shape: str, strides: str, *, numel: int = 6, offset: int = 0) -> bytes:
    """A tensor of the storage "0"; shape and strides as Python writes them."""
    storage = b"(" + plain_pickle("storage") + b"ctorch\nFloatStorage\n" + plain_pickle("0") + plain_pickle("cpu")
    numbers = b"".join(map(plain_pickle, (offset, eval(shape), eval(strides))))  # our own words
    rest = b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + plain_pickle(numel) + b"tQ" + numbers + rest + b"tR"


def programs() -> Iterator[bytes]:
    deep = nested_tuples(24) + b"h\x18"
    yield deep + b"\x93"
    yield deep + plain_pickle("x") + b"\x93"
    yield b"}" + deep + b"Ns"
    yield deep + b"Q"
    yield deep + b")R"
    yield deep
    yield b"}(" + b"".join(plain_pickle(i * (2**61 - 1)) + b"N" for i in range(30_000)) + b"u"
    yield b"\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6
    yield b"I" + b"9" * 10**6 + b"\n"
    yield b"L" + b"9" * 10**6 + b"L\n"
    yield b"]q\x01(" + b"K\x01" * 100_000 + b"e" + (b"ctorch\nSize\nh\x01\x85R0") * 5000
    yield b"}" * 10**6
    yield b"]\x94" * 10**6
    yield b"(" * 10**6
    yield b"]" * 100_000 + b"a" * 99_999
    yield b"}" * 490_000
    yield b"]\x94" * 240_000
    yield b"}" + plain_pickle("w" * 6) + b"(" + b"h\x00\x85" * 240_000
    yield b"X" + struct.pack("<i", 2**24 - 100) + "\U0001f600".encode() + b"x" * (2**24 - 104)
    yield b"}" + plain_pickle("x" * 10**6) + b"Ns"
    yield b"X" + struct.pack("<i", 2**30) + b"x"
    yield b"\x8d" + struct.pack("<Q", 2**62) + b"x"
    yield b"\x96" + struct.pack("<Q", 2**63 - 1)
    yield b"r" + struct.pack("<I", 2**32 - 1)
    for shape, strides in (
        ("(10**6, 4096)", "(0, 0)"),
        ("(2**62, 2**62)", "(0, 0)"),
        ("(2**62, 0)", "(0, 0)"),
        ("(1,) * 200", "(0,) * 200"),
        ("(3,)", "(2**70,)"),
        ("(2,)", "(-1,)"),
    ):
        yield b"}" + plain_pickle("w") + tensor(shape, strides) + b"s"
    yield b"}" + plain_pickle("w") + tensor("(3,)", "(1,)", numel=2**70) + b"s"
    yield b"}" + plain_pickle("w") + tensor("(3,)", "(1,)", offset=2**70) + b"s"
    many = b"".join(plain_pickle(f"w{i}") + tensor("(10**5,)", "(0,)") for i in range(200))
    yield b"}(" + many + b"u"


def headers() -> Iterator[bytes]:
    one = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    yield b"[" * 100_000
    yield ('{"a":' * 100_000).encode()
    yield f'{{"a":{one},"a":{one}}}'.encode()
    yield f'{{"a":{one.replace("[2]", "[" + "1," * 10**5 + "2]")}}}'.encode()
    yield f'{{"a":{one.replace("2", "9" * 10**5)}}}'.encode()
    yield f'{{"{"x" * 10**6}":{one}}}'.encode()
    yield f'{{"a":{one},"__metadata__":{{"x":"{"y" * 10**6}"}}}}'.encode()
    entries = (f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[8,8]}}' for i in range(50_000))
    yield f'{{"a":{one},{",".join(entries)}}}'.encode()
    names = (f"blocks.{i}." + "x." * 200 + "proj_l.weight" for i in range(19_000))
    yield json.dumps({key: {"dtype": "U8", "shape": [0], "data_offsets": [8, 8]} for key in names}).encode()
    yield b" " * 10**6
    yield b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":[[[[]]]]}}'


def texts() -> Iterator[bytes]:
    """Yields texts that are no JSON, or more of it than anybody needs."""
    yield b"[" * 100_000
    yield b'{"a":' * 100_000
    yield b'{"dim":' + b"9" * 10**5 + b"}"
    yield b'{"dim":1e999999}'
    yield b'"' + b"\\" * 10**6
    yield b"{" + b",".join(b'"%d":0' % i for i in range(200_000)) + b"}"
    yield b"[" + b"[]," * 10**6 + b"[]]"
    yield b""
    yield b"\xff\xfe" + b"{\x00}\x00"
    yield b"\x00" * 10**5
    yield b"NaN"
    yield b'{"weight_map": {"a": "/dev/zero"}}'
    yield b'{"weight_map": {"a": "../../etc/passwd"}}'
    yield b'{"weight_map": [' + b'"a",' * 10**5 + b'"a"]}'


def all_files() -> Iterator[tuple[str, Files]]:
    """Each with the reader that it is for."""
    _, storages = pickle_of({"w": np.arange(6, dtype=np.float32)})
    for program in programs():
        yield "pth", {"x.pth": zipped(b"\x80\x02" + program + b".", storages)}
    for header in headers():
        yield "safetensors", {"x.safetensors": with_length(header) + bytes(8)}
    for names in (19_999, 65_000):
        yield "pth", {"x.pth": zipped(b"\x80\x02}.", {f"data/{i}": b"" for i in range(names)})}
    for length in (0, 2**24, 2**40, 2**63, 2**64 - 1):
        yield "safetensors", {"x.safetensors": struct.pack("<Q", length) + bytes(64)}
    for text in texts():
        for kind, name in (("turbojax.json", "turbojax.json"), ("config.json", "config.json")):
            weights = {} if kind == "turbojax.json" else {"x.safetensors": to_safetensors(transformer().items())}
            yield kind, {name: text} | weights
        yield "index", {"model.safetensors.index.json": text}
        yield "shards", shards() | {"index.json": text}
    for field in ("num_layers", "dim", "ffn_dim", "text_len", "num_heads", "freq_dim"):
        for number in (0, -1, 10**9, 10**30, True, None, "8", [1]):
            yield "turbojax.json", {"turbojax.json": json.dumps(CONFIGURATION | {field: number}).encode()}
    for number in ("100000000", "9" * 400, "٣", "00", "-1"):
        for kind, name in (
            ("umt5", "blocks.{}.norm1.weight"),
            ("clip", "visual.transformer.{}.norm1.weight"),
            ("vae", "encoder.downsamples.{}.residual.2.weight"),
            ("transformer", "blocks.{}.norm3.weight"),
        ):
            tensors = networks()[kind][0] | {name.format(number): np.ones(16, np.float32)}
            yield kind, {"x.safetensors": to_safetensors(tensors.items())}
    blocks = {f"encoder.downsamples.{i}.residual.2.weight": np.ones((8, 1), np.int8) for i in range(10_000)}
    yield "vae", {"x.safetensors": to_safetensors((networks()["vae"][0] | blocks).items())}
    layers = {f"blocks.{i}.norm3.weight": np.ones(1, np.int8) for i in range(19_000)}
    yield "transformer", {"x.safetensors": to_safetensors((transformer() | layers).items())}
    layers = {f"blocks.{i}.norm1.weight": np.ones(1, np.int8) for i in range(19_000)}
    yield "umt5", {"x.safetensors": to_safetensors((networks()["umt5"][0] | layers).items())}
    for kind, beginning, ending in (
        ("transformer", "blocks.0.self_attn.q.", ".proj_l.weight"),
        ("transformer", "net.module.", "._extra_state"),
        ("vae", "encoder.middle.", ".residual.2.weight"),
        ("umt5", "encoder.block.", ".layer.0.layer_norm.weight"),
        ("clip", "textual.", ".weight"),
        ("lora", "transformer_2.", ".lora_A.weight"),
    ):
        many = {f"{beginning}{i}.{'net.' * 100}{ending}": np.ones(0, np.int8) for i in range(19_000)}
        yield kind, {"x.safetensors": to_safetensors((networks()[kind][0] | many).items())}
    down, up = (f"diffusion_model.blocks.0.self_attn.q.lora_{half}.weight" for half in ("down", "up"))
    for shapes in (
        ((0, 32), (32, 0)),
        ((10**6, 0), (0, 10**6)),
        ((4,), (4,)),
        ((), ()),
        ((4, 32), (32, 5)),
        ((1, 1), (1, 1)),
    ):
        yield (
            "lora",
            {"x.safetensors": to_safetensors((name, np.ones(s)) for name, s in zip((down, up), shapes, strict=True))},
        )
    good = networks()["lora"][0]
    for alpha in (np.ones(0), np.ones(3), np.array(np.nan), np.array(np.inf), np.array(0.0), np.ones((1, 1, 1))):
        yield (
            "lora",
            {"x.safetensors": to_safetensors((good | {down.replace("lora_down.weight", "alpha"): alpha}).items())},
        )


def transformer() -> dict[str, np.ndarray]:
    return networks()["transformer"][0]
