"""Weights on disk: reading checkpoints of several kinds through one face, and writing verified ones."""
