"""Operations: each a jnp reference and, where it exists, a GPU kernel behind one function that chooses."""
