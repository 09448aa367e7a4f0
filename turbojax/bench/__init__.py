"""Measurements: of ops, layers, videos, training and memory."""
