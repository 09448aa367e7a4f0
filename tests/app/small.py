"""Settings of the smallest video, by name and as words of a command line."""

SIZES = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 1}
SMALL = SIZES | {"weights": "demo", "dtype": "float32"}
FLAGS = [f"--config.{name}={value}" for name, value in SIZES.items()]
