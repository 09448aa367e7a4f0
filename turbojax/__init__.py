"""turbojax: fast Wan 2.1 / 2.2 video diffusion in JAX."""

from turbojax.errors import CheckpointError, UserError
from turbojax.pipeline.pipeline import TurboVideoPipeline, VideoOutput

__all__ = ["CheckpointError", "TurboVideoPipeline", "UserError", "VideoOutput"]
__version__ = "0.1.0"
