"""A small world of moving shapes with captions: data to train on, and prompts whose videos a program can judge."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"  # the small model that is shipped, in the published layouts
WORDS = MODEL / "google" / "umt5-xxl"  # its tokenizer
# Its settings, measured best in benchmarks/cpu/shapes.json: six of nine key blocks, where it was trained with four.
SHIPPED_TOPK = 0.67
SHIPPED_SIGMA_MAX = 1600.0
