"""Changes to a checkpoint's transformer while it loads."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from turbojax.errors import UserError
from turbojax.kernels import int8
from turbojax.models.wan import WanConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Options of a transformer; None keeps what the checkpoint says.

    quant_linear: True for int8 linear layers in the blocks, quantizing while loading where the file is not; False
      dequantizes an int8 one.
    quant_scheme: a name of `turbojax.kernels.int8.QUANT_SCHEMES`, "block128" unless the checkpoint has another.
    attention_type: "original", "sla" or "sagesla". sla_topk: fraction of key blocks that the latter two attend to.
    sage_values: how SageSLA multiplies with v, see `turbojax.kernels.sage.reference`.
    """

    quant_linear: bool | None = None
    quant_scheme: str | None = None
    attention_type: str | None = None
    sla_topk: float | None = None
    sage_values: str | None = None
    dtype: Any = jnp.bfloat16

    def apply(self, config: WanConfig) -> WanConfig:
        """Returns the checkpoint's configuration with these changes.

        Raises UserError for what cannot be, such as an int8 scheme for linear layers that are not int8.
        """
        scheme = int8.quant_scheme(self.quant_scheme) if self.quant_scheme else None
        int8_layers = config.quant is not None if self.quant_linear is None else self.quant_linear
        if scheme and not int8_layers:
            reason = "on a checkpoint without int8 layers; add quant_linear=True"
            if self.quant_linear is False:
                reason = "with quant_linear=False; leave out one of them"
            raise UserError(f"quant_scheme={self.quant_scheme!r} has no effect {reason}")
        changes = {name: getattr(self, name) for name in ("attention_type", "sla_topk", "sage_values", "dtype")}
        changes = {name: value for name, value in changes.items() if value is not None}
        quant = (scheme or config.quant or int8.QuantConfig()) if int8_layers else None
        return dataclasses.replace(config, quant=quant, **changes)
