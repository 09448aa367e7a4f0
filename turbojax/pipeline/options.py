"""Options that decide the networks of a pipeline and where they are."""

import dataclasses
from pathlib import Path

from turbojax.diffusion import RCM, expert_split
from turbojax.kernels.int8 import QuantConfig
from turbojax.memory.experts import BOUNDARY
from turbojax.memory.planner import parse
from turbojax.models.published import known_network
from turbojax.models.wan import WanConfig
from turbojax.weights.lora import LoRA
from turbojax.weights.options import NetworkOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadOptions(NetworkOptions):
    """Options of a pipeline; with equal ones a loaded pipeline serves.

    weights: a transformer file, a folder or a Hugging Face repository; of two experts, either one's file finds the
      other. "random" generates the weights of `model`, a name of `turbojax.models.published.MODELS`, for benchmarks.
    vae, text_encoder, tokenizer, image_encoder: files or folders. What is neither given nor held by the weights
      (TurboDiffusion's repositories have the transformer alone) comes from Wan-AI/Wan2.1-T2V-1.3B; image_encoder (CLIP,
      for Wan 2.1 image to video) from Wan-AI/Wan2.1-I2V-14B-480P.
    loras: merged while loading, before quantization; see `turbojax.weights.lora`.
    boundary: the rectified-flow time at which experts change, from high noise to low.
    cache_prompts: keep text embeddings in the user's cache folder. The text encoder is checked while loading and loaded
      at the first prompt that is not there.
    memory: "auto" keeps on the device what fits beside the first call; "resident" everything; "stream" leaves
      transformers and text encoder in host memory and copies them, prefetched one layer ahead; a number is the limit in
      GB to plan for, as "auto", which may also keep one of two experts in host memory at a time, see
      `turbojax.memory.experts`. Without a GPU "auto" is "resident".

    Raises UserError for what no network can have.
    """

    weights: str | Path
    model: str | None = None
    vae: str | Path | None = None
    text_encoder: str | Path | None = None
    tokenizer: str | Path | None = None
    image_encoder: str | Path | None = None
    loras: tuple[LoRA, ...] = ()
    boundary: float = BOUNDARY
    cache_prompts: bool = True
    memory: str | float = "auto"

    def __post_init__(self):
        parse(self.memory, None)
        expert_split(RCM().times, self.boundary)
        network = WanConfig.t2v_1_3b() if self.model is None else known_network(self.model)
        self.apply(dataclasses.replace(network, quant=QuantConfig()))  # one that may have all of them
