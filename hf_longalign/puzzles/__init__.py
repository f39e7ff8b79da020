"""Questions over long texts that are right by construction: for evaluation, and with other words for training."""

from hf_longalign.puzzles.puzzle import Puzzle, set_f1
from hf_longalign.puzzles.rows import training_rows
from hf_longalign.puzzles.tasks import TASKS, draw_puzzle


__all__ = ["TASKS", "Puzzle", "draw_puzzle", "set_f1", "training_rows"]
