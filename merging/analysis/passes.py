"""One pass over all tensors, on all cores.

Every analysis of this package has the same shape: a function of one tensor, run on many tensors, whose results do not
depend on who computed them. ``over_tensors`` gives the tensors to workers (very large ones first, so that none is left
alone with one at the end), counts the elements that are done and stops within a block when asked to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from ..cores import available_cores
from ..errors import Cancelled, NumbersError
from ..methods import Workspace
from ..methods.lazy_torch import torch
from ..workers import Told, can_fork, spread
from .models import Compared, without_recipe

R = TypeVar("R")
Progress = Callable[[int, int, str], None]
"""``progress(done, total, what)``: elements that are done, elements in all, and what is being measured."""
Pulse = Callable[[int], None]
"""``pulse(elements)``: to be called after each block; raises Cancelled when the user wants to stop."""


def over_tensors(
    work: Callable[[Compared, Workspace, Pulse], R],
    tensors: Sequence[Compared],
    *,
    threads: int = 0,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    what: str = "",
    passes: int = 1,
) -> list[R]:
    """``work(tensor, workspace, pulse)`` of each tensor; results in the order of the tensors.

    ``threads``: number of workers, 0 means one per available core (16 at most). ``progress`` is called in this
    process. ``passes``: how often the work usually goes over its tensor. Results travel between processes: they are
    small and can be pickled. Raises Cancelled soon after ``stop`` is set, and the first error of any worker, such as
    NumbersError E_NOT_FINITE.
    """
    wish, local, lock = stop or threading.Event(), threading.local(), threading.Lock()
    total, done = passes * sum(tensor.numel for tensor in tensors), 0

    def told(elements: int, moved: int) -> None:
        nonlocal done
        with lock:
            done += elements
            if progress is not None:
                progress(min(done, total), total, what)

    def one(tensor: Compared, told: Told) -> R:
        if not hasattr(local, "workspace"):
            local.workspace = Workspace()

        def pulse(elements: int) -> None:
            if wish.is_set():
                raise Cancelled()
            told(elements, 0)

        pulse(0)
        try:
            return work(tensor, local.workspace, pulse)
        except NumbersError as error:
            raise without_recipe(error) from None

    count = threads or min(available_cores(), 16)
    fair = total // (8 * count * passes) + 1
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].numel if tensors[i].numel > fair else 0)
    with one_torch_thread():
        found = spread(one, [tensors[i] for i in order], count, can_fork("cpu"), told, wish)
    told(total, 0)  # the passes were an estimate
    results: list[R] = [found[0]] * len(found) if found else []
    for i, result in zip(order, found, strict=True):
        results[i] = result
    return results


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """The workers are the parallelism; torch's own threads would fight over the same cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
