import sys

import jax

from tests.parity.compare import main

with jax.default_matmul_precision("highest"):
    sys.exit(main(sys.argv[1:]))
