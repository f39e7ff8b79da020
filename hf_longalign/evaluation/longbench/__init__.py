"""LongBench v1: its tasks, prompts, metrics and averages (https://arxiv.org/abs/2308.14508)."""
