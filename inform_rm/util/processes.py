"""Several processes with one task, started with ``accelerate launch``: each computes a part, all get all results.

Every process must make the same calls in the same order. An error in one is raised in all, so that none waits for
another that is gone; a process that dies outright is noticed by what launched it, which then ends the others.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from inform_rm.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


def join_processes(device: Any = None) -> None:
    """Connect with the other processes of the launch; nothing happens in a single one.

    ``device`` is where the caller's model goes; ``None`` is the GPU that belongs to this process, or the CPU.
    `InputError` if it is one that several processes would share.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    if device is not None and str(device) not in ("cpu", "cuda"):
        raise InputError(
            f"device: {str(device)!r} with {os.environ['WORLD_SIZE']} processes; each of them uses its own GPU. "
            "Leave device out, or start one process."
        )
    from accelerate import PartialState

    PartialState(cpu=str(device) == "cpu")


def num_processes() -> int:
    """Number of connected processes; 1 without a launch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this is the process that writes files."""
    return num_processes() == 1 or dist.get_rank() == 0


def from_main(make: Callable[[], Result]) -> Result:
    """What ``make`` gives in the main process, in all processes; it runs in that one alone."""
    if num_processes() == 1:
        return make()
    outcome, error = _attempt(make) if is_main_process() else (None, None)
    box = [outcome]
    dist.broadcast_object_list(box, src=0)
    return _result(box[0], 0, error)


def computed_in_turn(items: Sequence[Item], compute: Callable[[Item], Result]) -> Iterator[tuple[Item, Result]]:
    """``(item, compute(item))`` for every item in order, in all processes, each item computed in one of them.

    All processes call ``compute`` equally often, as FSDP demands of forward passes: where items are left for only some
    of them, the others repeat the last one and forget the result.
    """
    world = num_processes()
    if world == 1:
        yield from ((item, compute(item)) for item in items)
        return
    for start in range(0, len(items), world):
        turn = items[start : start + world]
        own = turn[min(dist.get_rank(), len(turn) - 1)]
        outcome, error = _attempt(lambda own=own: compute(own))  # type: ignore[misc]
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, outcome)
        results = [_result(each, rank, error) for rank, each in enumerate(gathered)]
        yield from zip(turn, results, strict=False)


def _attempt(make: Callable[[], Any]) -> tuple[tuple[str, Any], Exception | None]:
    """What goes to the others, and the error itself, which need not survive the journey."""
    try:
        return ("done", make()), None
    except InputError as error:
        return ("bad input", str(error)), error
    except Exception as error:
        return ("failed", f"{type(error).__name__}: {error}"), error


def _result(outcome: Any, rank: int, own_error: Exception | None) -> Any:
    if own_error is not None:
        raise own_error
    kind, value = outcome
    if kind == "done":
        return value
    raise (InputError if kind == "bad input" else RuntimeError)(f"process {rank}: {value}")
