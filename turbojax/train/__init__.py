"""Training: SLA fine-tuning and rCM distillation (arXiv 2510.08431). Inference imports none of it."""
