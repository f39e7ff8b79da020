"""Evaluation of long-context models: what a reader sees of it."""
