"""Questions over long texts that are right by construction: for evaluation, and with other words for training."""

from hf_longalign.puzzles.puzzle import Puzzle, set_f1
from hf_longalign.puzzles.tasks import TASKS, draw_puzzle, training_rows


__all__ = ["TASKS", "Puzzle", "draw_puzzle", "set_f1", "training_rows"]
