"""Arrays by their shapes: B batch, L tokens, S keys, N heads, H head dim, D width."""

from jaxtyping import Array, Float, Int32

Tokens = Float[Array, "B L N H"]  # queries, and keys and values where there are as many
Keys = Float[Array, "B S N H"]
BlockTable = Int32[Array, "B N q_blocks chosen"]  # places of the key blocks that each query block attends to
Rows = Float[Array, "*rows D"]
Vector = Float[Array, "D"]
