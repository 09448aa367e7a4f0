"""turbojax: fast Wan 2.1 / 2.2 video diffusion in JAX."""

from turbojax.errors import CheckpointError, UserError
from turbojax.pipeline.options import LoadOptions
from turbojax.pipeline.pipeline import TurboVideoPipeline, VideoOutput
from turbojax.pipeline.request import Request

__all__ = ["CheckpointError", "LoadOptions", "Request", "TurboVideoPipeline", "UserError", "VideoOutput"]
__version__ = "0.1.0"
