"""Doing the same with many items at once, in threads that do not outlive an interruption."""

import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    work: Callable[[Item], Result], items: Sequence[Item], num_threads: int
) -> Iterator[tuple[Item, Result]]:
    """``(item, work(item))`` as they are done, in any order.

    After an exception no further item is taken; what is under way is still given, then the exception is raised. The
    threads are daemons that nothing waits for, so that Ctrl-C need not wait for a slow answer.
    """
    ended = threading.Event()
    first_error: BaseException | None = None

    def run(item: Item) -> Any:  # (item, result, error), or None where no further item is taken
        try:
            return None if ended.is_set() else (item, work(item), None)
        except BaseException as error:
            ended.set()
            return item, None, error

    with ThreadPool(max(1, min(num_threads, len(items)))) as pool:
        try:
            for item, result, error in filter(None, pool.imap_unordered(run, items)):
                if error is None:
                    yield item, result
                first_error = first_error or error
        finally:
            ended.set()
    if first_error is not None:
        raise first_error
