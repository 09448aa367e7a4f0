"""Sizes of the networks of the world of shapes: what is shipped, and a tiny form that shows that the way works.

All in the published layouts. Bytes as shipped, together 11.9 MB: the transformer with int8 weights 9.8, the autoencoder
1.8 and the text encoder 0.2 in bfloat16.
"""

from typing import Any

from turbojax.models.umt5 import UMT5Config
from turbojax.models.vae import VAEConfig
from turbojax.models.wan import WanConfig
from turbojax.shapes.text import text_config, word_tokenizer
from turbojax.shapes.words import vocabulary

TEXT_DIM = 64
TINY = "-tiny"


def wan(**changes) -> WanConfig:
    """Returns the sizes of 9.1 M parameters, heads of 64."""
    sizes = dict(dim=256, ffn_dim=1024, num_heads=4, num_layers=8, text_dim=TEXT_DIM)
    return WanConfig(**(sizes | changes))


def autoencoder(**changes) -> VAEConfig:
    """Returns the sizes of 0.9 M parameters."""
    sizes: dict[str, Any] = dict(dim=8, dim_mult=(1, 2, 4, 5), num_res_blocks=1)
    return VAEConfig(**(sizes | changes))


def text_encoder(**changes) -> UMT5Config:
    """Returns the sizes of 0.1 M parameters."""
    sizes = dict(dim=TEXT_DIM, attention_dim=64, ffn_dim=128, num_heads=4, num_layers=2)
    return text_config(word_tokenizer(vocabulary()), **(sizes | changes))


WANS = {"shapes": wan, f"shapes{TINY}": lambda: wan(dim=128, ffn_dim=128, num_heads=2, num_layers=2)}
AUTOENCODERS = {"shapes": autoencoder, f"shapes{TINY}": lambda: autoencoder(dim=4)}
TEXT_ENCODERS = {"shapes": text_encoder, f"shapes{TINY}": lambda: text_encoder(num_layers=1)}
