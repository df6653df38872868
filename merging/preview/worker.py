"""The child process of a preview: it holds the merge and its network, and answers one request after another.

The one idea: what is big and foreign lives here, and can be ended at any time without harm. While the main thread
computes, another one listens, so that "stop" is heard in the middle of a merge, a batch or an answer.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ..errors import AmalgamError, Cancelled, OutputError, RecipeError
from ..evaluation.child import Send
from .merge import KeptMerge
from .network import RunningNetwork


class Worker:
    """What can be asked of a preview: ``merge``, ``score``, ``generate``. ``folder``: an empty one of its own."""

    def __init__(self, folder: Path, threads: int = 1, device: str = "cpu"):
        self.stop = threading.Event()
        self.kept = KeptMerge(threads, device, self.stop)
        self.network = RunningNetwork(folder, threads, device, self.look_up)

    def merge(self, recipe: Any, tensors: Sequence[str] | None = None) -> dict[str, Any]:
        return self.kept.merge(recipe, tensors)

    def score(self, tasks: Sequence[str], limit: int = 0) -> list[dict[str, Any]]:
        self.bring_up()
        return self.network.score(tasks, limit)

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 32) -> list[str]:
        self.bring_up()
        return self.network.generate(prompts, max_new_tokens)

    def bring_up(self) -> None:
        """The network with the numbers of the last merge."""
        plan = self.kept.plan
        if plan is None:
            why = "Nothing was merged yet, or the last merge was not finished."
            raise RecipeError("E_RECIPE_INPUTS", "There is no merge to look at.", why, "Merge first.")
        merged = {tensor.name: self.kept.results[tensor.name] for tensor in plan.tensors}
        self.network.bring_up(merged, plan.side_files.files)

    def look_up(self) -> None:
        if self.stop.is_set():
            raise Cancelled("Stopped.", "")


def serve(send: Send, requests: Connection, folder: str, threads: int, device: str) -> None:
    """Answer each request (number, what, arguments) with ("done", number, result) or ("failed", number, error), until
    the other end is closed. ("stop", number) stops that one."""
    from ..engine import choose_device
    from ..networks import import_libraries

    inbox: SimpleQueue[tuple | None] = SimpleQueue()
    worker = Worker(Path(folder), threads, choose_device(device))
    stopped: set[int] = set()
    current = 0

    def listen() -> None:
        try:
            while True:
                message = requests.recv()
                if message[0] != "stop":
                    inbox.put(message)
                    continue
                stopped.add(message[1])
                if message[1] == current:
                    worker.stop.set()
        except (EOFError, OSError):
            worker.stop.set()
            inbox.put(None)

    threading.Thread(target=listen, daemon=True).start()
    warming = threading.Thread(target=import_libraries, daemon=True)  # takes seconds; a merge does without
    warming.start()
    while (request := inbox.get()) is not None:
        current, what, arguments = request
        if what != "merge" or threads > 1:  # several: never fork in the middle of an import
            warming.join()
        worker.stop.clear()
        if current in stopped:  # asked after ``current`` was set: whichever came first, it is seen
            worker.stop.set()
        try:
            send("done", current, getattr(worker, what)(*arguments))
        except Exception as error:
            send("failed", current, _typed(error))


def _typed(error: Exception) -> AmalgamError:
    """Whatever a foreign model makes the libraries do, as an error that says what and where."""
    if isinstance(error, AmalgamError):
        return error
    first = str(error).strip().split("\n")[0][:300]
    frames = traceback.extract_tb(error.__traceback__)
    where = [f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in frames]
    why = f"{type(error).__name__}: {first}{where[-1] if where else ''}."
    if isinstance(error, MemoryError) or "out of memory" in first:
        return OutputError("E_MEMORY", "There was not enough memory for the preview.", why, "Close other programs.")
    fix = "Check that the merged model works with transformers: merge it into a folder, and evaluate that."
    return OutputError("E_WORKER", "The preview failed.", why, fix)
