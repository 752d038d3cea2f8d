"""Doing the same with many items at once, in threads that do not outlive an interruption."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    work: Callable[[Item], Result], items: Sequence[Item], num_threads: int
) -> Iterator[tuple[Item, Result]]:
    """``(item, work(item))`` as they are done, in any order.

    After an exception no further item is taken; what is under way is still given, then the exception is raised. The
    threads are daemons, so that Ctrl-C need not wait for a slow answer.
    """
    todo: queue.SimpleQueue[Item] = queue.SimpleQueue()
    for item in items:
        todo.put(item)
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()  # (item, result, error), or None from a thread that ends
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            try:
                item = todo.get_nowait()
            except queue.Empty:
                break
            try:
                done.put((item, work(item), None))
            except BaseException as error:
                ended.set()
                done.put((item, None, error))
        done.put(None)

    alive = min(num_threads, len(items))
    for _ in range(alive):
        threading.Thread(target=run, daemon=True).start()
    first_error: BaseException | None = None
    try:
        while alive:
            entry = done.get()
            if entry is None:
                alive -= 1
            elif entry[2] is None:
                yield entry[0], entry[1]
            else:
                first_error = first_error or entry[2]
    finally:
        ended.set()
    if first_error is not None:
        raise first_error
