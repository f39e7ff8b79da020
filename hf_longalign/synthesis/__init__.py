"""Context Synthesis: short instruction-answer pairs become long-context chat data (https://arxiv.org/abs/2502.15592)."""
