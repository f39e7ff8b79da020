"""Doing something in the main process alone, while the others wait for as long as it takes."""

import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar


# No push takes longer; a process that waits is let go the moment the main process ends or dies.
_PATIENCE = timedelta(days=30)
Result = TypeVar("Result")


def on_main_process(function: Callable[[], Result]) -> Result:
    """Call a function in the main process and return its result in every process.

    The others wait in a group of their own, on gloo with a time-out of its own: an ordinary barrier gives up after 10
    (NCCL) or 30 minutes (gloo), in the midst of a long push. Every process must call this at about the same time.

    Args:
        function: what to do; its result must be picklable where there are several processes.

    Raises:
        RuntimeError: in the other processes, when the function failed in the main process, which raises its own error.

    Example:

    >>> on_main_process(lambda: "https://huggingface.co/user/adapter")
    'https://huggingface.co/user/adapter'

    ```python
    url = on_main_process(lambda: publish_adapter("outputs/adapter", "user/adapter"))
    ```
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return function()
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    outcome: list[Any] = [None]
    try:
        if dist.get_rank() == 0:
            try:
                result = function()
                pickle.dumps(result)
                outcome = [(True, result)]
            except BaseException as error:
                outcome = [(False, f"{type(error).__name__}: {error}")]
                raise
            finally:
                dist.broadcast_object_list(outcome, src=0, group=group, device=None)
            return result
        dist.broadcast_object_list(outcome, src=0, group=group)
    finally:
        dist.destroy_process_group(group)
    done, value = outcome[0]
    if not done:
        raise RuntimeError(f"The main process failed: {value}")
    return value
