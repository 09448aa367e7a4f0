"""A small world of moving shapes with captions: data to train on, and prompts whose videos a program can judge."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"  # the small model that is shipped, in the published layouts
WORDS = MODEL / "google" / "umt5-xxl"  # its tokenizer
SHIPPED_TOPK = 0.5  # share of key blocks that it runs with: twice what it was trained with, for cleaner shapes
