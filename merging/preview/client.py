"""Ask a merge that is not written anywhere: what would it score, what would it say?

    with Preview() as preview:
        if preview.open(recipe).possible:
            merged = preview.merge(recipe)                                # plain data, as ``Recipe.to_data`` gives it
            rows = preview.score(["assets/demo/tasks/sort.jsonl"], limit=50, of=merged["number"])
            texts = preview.generate(["sort hgfedcba="], 10, of=merged["number"])

The one idea: whoever drags a slider wants the newest position, and not those that it passed. So requests are answered
one at a time, and a newer one takes the place of older ones that it makes pointless: a merge of everything before it, a
score of older scores, texts of older texts. Those raise Cancelled, also in the middle of their work. ``of`` says which
merge a score is meant for: if there is a newer one already, it is Cancelled instead of being answered about another.

All work is done by one child process that keeps models and network in memory, has no network connection, ends with this
process and can be ended at any time. If it dies, the request in hand fails with a typed error, and the next one starts
another. A thread of its own starts it, because a child ends with the *thread* that it was started by.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from ..errors import AmalgamError, Cancelled, OutputError
from ..evaluation.child import Child
from ..plan import make_plan
from ..recipe import Recipe
from .room import Cost, cost_of, private_memory

PATIENCE = 2.0
"""Seconds after a stop until the child is ended if it has not answered."""


@dataclass(eq=False)
class _Request:
    number: int
    what: str
    arguments: tuple
    answer: Future = field(default_factory=Future)
    stopped: float | None = None
    """When somebody asked for it to be stopped, come what may."""

    def makes_pointless(self, older: _Request) -> bool:
        return self.what == "merge" or self.what == older.what


class Preview:
    """See the module. Thread-safe; a context manager, or call ``close``.

    ``threads``: for scoring and generating, and for merges that are large enough to gain by it. ``device``: auto, cpu,
    cuda, cuda:1, mps.
    """

    def __init__(self, *, threads: int = 1, device: str = "cpu") -> None:
        self.threads, self.device = threads, device
        self._changed = threading.Condition()
        self._waiting: list[_Request] = []
        self._current: _Request | None = None
        self._number = 0
        self._newest_merge = 0
        self._merged: tuple | None = None  # arguments of the last merge that succeeded
        self._wanted = self._closing = False
        self._thread: threading.Thread | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._child: Child | None = None
        self._merged_by: Child | None = None
        self._messages: Iterator[tuple | None] = iter(())
        self._requests: Connection | None = None
        self._sending = threading.Lock()

    # -- what can be asked -----------------------------------------------------------------------------

    def open(self, recipe: Any) -> Cost:
        """What a preview of the recipe takes, from headers alone; if that is possible, the child process is started, so
        that the first merge need not wait for it. Raises RecipeError, InputError; models must be on this machine.
        """
        with make_plan(Recipe.parse(recipe), offline=True) as plan:
            if plan.blockers:
                raise plan.blockers[0]
            child = self._child
            held = private_memory(child.pid) if child is not None else 0
            cost = cost_of(plan, self.threads, self.device, held)
        if cost.possible:
            with self._changed:
                self._wanted = True
                self._start_thread()
                self._changed.notify_all()
        return cost

    def merge(self, recipe: Any, tensors: Sequence[str] | None = None) -> dict[str, Any]:
        """Merge into memory what has changed since the last merge (``tensors``: only these, by name).

        Returns {number, seconds, changed_tensors, reused, complete}: how many tensors were computed, and for how many
        of them thresholds and norms were still good. Raises what planning and merging would; ``E_MEMORY``; Cancelled.
        """
        Recipe.parse(recipe)  # an error in it has its place here, and costs nobody anything
        return self._ask("merge", recipe, None if tensors is None else list(tensors))

    def score(self, tasks: Sequence[str], limit: int = 0, of: int | None = None) -> list[dict[str, Any]]:
        """Score the merge on task files (or folders of them), on the first ``limit`` items (0: all).

        Returns {task, metric, right, items, mean, low, high} per task and metric: what evaluating the written model
        gives. ``right`` and the 95 % Wilson interval are None for quantities. Raises TaskError, NumbersError,
        Cancelled.
        """
        return self._ask("score", [str(task) for task in tasks], limit, of=of)

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 32, of: int | None = None) -> list[str]:
        """What the merge writes after each prompt, greedily, without chat template; for causal language models."""
        return self._ask("generate", list(prompts), max_new_tokens, of=of)

    def stop(self) -> None:
        """Cancel what is waited for. Ends the child if it does not give way within two seconds."""
        with self._changed:
            for request in self._waiting:
                request.answer.set_exception(Cancelled("Stopped.", ""))
            self._waiting.clear()
            if self._current is not None:
                self._current.stopped = time.monotonic()
                self._send("stop", self._current.number)

    def close(self) -> None:
        """End the child now, and give back all memory."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        atexit.unregister(self.close)
        if self._folder is not None:
            self._folder.cleanup()

    def __enter__(self) -> Preview:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- in the thread of whoever asks -----------------------------------------------------------------

    def _ask(self, what: str, *arguments: Any, of: int | None = None) -> Any:
        with self._changed:
            if self._closing:
                raise Cancelled("The preview was closed.", "")
            if of is not None and of != self._newest_merge:
                raise Cancelled("There is a newer merge.", "")
            self._number += 1
            request = _Request(self._number, what, arguments)
            if what == "merge":
                self._newest_merge = request.number
            for older in [one for one in self._waiting if request.makes_pointless(one)]:
                self._waiting.remove(older)
                older.answer.set_exception(Cancelled("A newer request took its place.", ""))
            if self._current is not None and request.makes_pointless(self._current):
                self._send("stop", self._current.number)
            self._waiting.append(request)
            self._start_thread()
            self._changed.notify_all()
        return request.answer.result()

    def _start_thread(self) -> None:
        if self._thread is None:
            self._folder = tempfile.TemporaryDirectory(prefix="amalgam-preview-", ignore_cleanup_errors=True)
            self._thread = threading.Thread(target=self._live, name="preview", daemon=True)
            self._thread.start()
            atexit.register(self.close)  # a program that forgets to close must still be able to end

    def _send(self, *message: Any) -> None:
        with self._sending, contextlib.suppress(OSError):  # a child that is gone is noticed by who waits for it
            if self._requests is not None:
                self._requests.send(message)

    # -- in the thread of its own ----------------------------------------------------------------------

    def _live(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._waiting or self._wanted)
                self._wanted = False
                if self._closing:
                    break
            try:
                child = self._running_child()
            except AmalgamError as error:
                self._give_up(error)
                continue
            with self._changed:
                if self._waiting:
                    self._current = self._waiting.pop(0)
            if self._current is not None:
                self._serve(child, self._current)
        self._drop_child()
        self._give_up(Cancelled("The preview was closed.", ""))

    def _serve(self, child: Child, request: _Request) -> None:
        steps = [(request.what, request.arguments)]
        if request.what == "merge":
            self._merged = None
        elif self._merged is not None and self._merged_by is not child:
            steps.insert(0, ("merge", self._merged))  # the child is new and does not know it
        try:
            for what, arguments in steps:
                self._send(request.number, what, arguments)
                result = self._result(child, request)
                if what == "merge":
                    self._merged, self._merged_by = arguments, child
        except BaseException as error:
            self._end()
            request.answer.set_exception(error)
        else:
            self._end()
            request.answer.set_result({"number": request.number, **result} if request.what == "merge" else result)

    def _result(self, child: Child, request: _Request) -> Any:
        """Wait for the child's answer, and see to it that nobody waits in vain."""
        try:
            for message in self._messages:
                if self._closing or (request.stopped and time.monotonic() - request.stopped > PATIENCE):
                    self._drop_child()
                    raise Cancelled("Stopped.", "")
                if message is not None:
                    break
            else:
                raise OutputError("E_WORKER", "The preview process ended.")  # it never does by itself
        except Cancelled:
            raise
        except Exception as error:  # it died, or could not even begin
            self._drop_child()
            raise _died(error) from None
        kind, _, content = message
        if kind == "failed":
            raise content
        return content

    def _end(self) -> None:
        with self._changed:
            self._current = None

    def _give_up(self, error: AmalgamError) -> None:
        with self._changed:
            for request in self._waiting:
                request.answer.set_exception(error)
            self._waiting.clear()

    def _running_child(self) -> Child:
        """The child; a new one if there is none or it died in the meantime. Raises OutputError ``E_WORKER``."""
        if self._child is None or not self._child.alive:
            self._drop_child()
            from .worker import serve  # not before: whoever imports this module does not wait for all of that

            assert self._folder is not None
            theirs, ours = multiprocessing.get_context("spawn").Pipe(duplex=False)
            try:
                self._child = Child(serve, theirs, self._folder.name, self.threads, self.device, threads=self.threads)
            except BaseException:
                ours.close()
                raise
            finally:
                theirs.close()
            self._requests, self._messages = ours, self._child.messages()
        return self._child

    def _drop_child(self) -> None:
        with self._sending:
            if self._requests is not None:
                self._requests.close()
            self._requests = None
        if self._child is not None:
            self._child.close()
        self._child = None


def _died(error: Exception) -> AmalgamError:
    fix = "Try again: a new process is started. If it happens again, merge into a folder and evaluate that."
    if not isinstance(error, AmalgamError):  # a defect; its last line says most
        return OutputError("E_WORKER", "The preview process failed.", str(error).strip().split("\n")[-1][:300], fix)
    if error.code != "E_WORKER":
        return error
    return OutputError("E_WORKER", error.what.replace("child process", "preview process"), error.why, fix)
