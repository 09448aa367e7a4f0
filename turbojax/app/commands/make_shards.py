"""Makes training data: encodes videos and their captions into shards of latents and text embeddings.

    python scripts/make_shards.py --videos=clips --output=data --weights=wan --resolution=480p --num_frames=81
    python scripts/make_shards.py --videos=clips --output=data --weights=demo --height=32 --width=48 --num_frames=5

--videos is a folder. Captions are in its captions.jsonl ({"file": NAME, "caption": TEXT} a line), its captions.csv
(columns file and caption), a file of that kind given as --captions, or in a text file beside each video. A clip is the
first --num_frames frames of a video at --fps, resized and cut around the centre to the size; videos that are too short
or cannot be read are reported and left out. Run it again after a stop: finished shards are not made again.

Weights as for scripts/generate.py: --weights is a folder or a Hugging Face repository with VAE, text encoder and
tokenizer, Wan-AI/Wan2.1-T2V-1.3B if not given, or demo; --vae, --text_encoder and --tokenizer name one apart. Further
flags: --captions, --aspect_ratio=16:9 (of --resolution), --height and --width in pixels, --fps=16, --dtype=bfloat16 (or
float32), --shard_size=64 (samples), --negative_prompt (its embedding is kept for guidance). docs/training-data.md has
the format.
"""

import jax
import jax.numpy as jnp
from absl import flags, logging

from turbojax.errors import UserError
from turbojax.files import check_folder
from turbojax.media.ffmpeg import check_decoder
from turbojax.media.video import check_fps, video_size
from turbojax.models.vae import VAEConfig
from turbojax.pipeline.request import latent_shape
from turbojax.shapes import MODEL
from turbojax.train.make_shards import find_clips, load_encoders, make_shards
from turbojax.weights.files import find_components, open_repository

FLAGS = flags.FlagValues()
VIDEOS = flags.DEFINE_string("videos", None, "folder of videos", flag_values=FLAGS)
CAPTIONS = flags.DEFINE_string("captions", None, "list of files and captions, .jsonl or .csv", flag_values=FLAGS)
OUTPUT = flags.DEFINE_string("output", None, "folder to write", flag_values=FLAGS)
WEIGHTS = flags.DEFINE_string(
    "weights", None, "folder or repository with VAE, text encoder and tokenizer, or demo", flag_values=FLAGS
)
VAE = flags.DEFINE_string("vae", None, "file or folder", flag_values=FLAGS)
TEXT_ENCODER = flags.DEFINE_string("text_encoder", None, "file or folder", flag_values=FLAGS)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "file or folder", flag_values=FLAGS)
RESOLUTION = flags.DEFINE_string("resolution", "480p", "480p or 720p", flag_values=FLAGS)
ASPECT_RATIO = flags.DEFINE_string("aspect_ratio", "16:9", "16:9, 9:16, 4:3, 3:4 or 1:1", flag_values=FLAGS)
HEIGHT = flags.DEFINE_integer(
    "height", None, "pixels, a multiple of 16; instead of resolution and aspect ratio", flag_values=FLAGS
)
WIDTH = flags.DEFINE_integer("width", None, "pixels, a multiple of 16", flag_values=FLAGS)
FRAMES = flags.DEFINE_integer("num_frames", 81, "4 n + 1", flag_values=FLAGS)
FPS = flags.DEFINE_integer("fps", 16, "frames a second", flag_values=FLAGS)
DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float32"], "of the models and of what is written", flag_values=FLAGS
)
SHARD_SIZE = flags.DEFINE_integer("shard_size", 64, "samples a shard", flag_values=FLAGS)
NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", "", "kept as an embedding, for guidance", flag_values=FLAGS)


def main() -> None:
    if not VIDEOS.value or not OUTPUT.value:
        raise UserError("give --videos=FOLDER and --output=FOLDER, see --help")
    width, height = video_size(RESOLUTION.value, ASPECT_RATIO.value)
    width = width if WIDTH.value is None else WIDTH.value
    height = height if HEIGHT.value is None else HEIGHT.value
    latent_shape(VAEConfig.wan2_1(), FRAMES.value, height, width)  # what can be told before minutes of loading
    check_fps(FPS.value)
    check_decoder()
    check_folder(OUTPUT.value)
    clips = find_clips(VIDEOS.value, CAPTIONS.value)
    given = {"vae": VAE.value, "text_encoder": TEXT_ENCODER.value, "tokenizer": TOKENIZER.value}
    weights = str(MODEL) if WEIGHTS.value == "demo" else WEIGHTS.value
    where = find_components(open_repository(weights) if weights else None, given)
    if jax.default_backend() == "cpu" and WEIGHTS.value != "demo":
        logging.warning("No GPU was found; real models take minutes a clip on a CPU (pip install turbojax[cuda12])")
    vae, text, index = load_encoders(
        where,
        dtype=jnp.dtype(DTYPE.value),
        num_frames=FRAMES.value,
        height=height,
        width=width,
        fps=FPS.value,
        negative_prompt=NEGATIVE_PROMPT.value,
        shard_size=SHARD_SIZE.value,
    )
    summary = make_shards(clips, OUTPUT.value, vae, text, index)
    logging.info("%s: %d samples written, %d there before, %d clips left out", OUTPUT.value, *summary)
