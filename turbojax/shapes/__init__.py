"""A small world of moving shapes with captions: data to train on, and prompts whose videos a program can judge."""
