"""Events whose errors become messages, and functions that take an event's data wherever they like."""

from __future__ import annotations

import functools
import inspect
import logging
import secrets
import typing
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from merging.errors import AmalgamError

from .components import cards

log = logging.getLogger("amalgam.ui")
HIDDEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
SPECIAL = (gr.OAuthToken, gr.OAuthToken | None, gr.OAuthProfile, gr.OAuthProfile | None)


def wire(
    message: gr.HTML,
    event: Any,
    fn: Callable[..., Any],
    inputs: list[Any],
    outputs: list[Any],
    on_error: Callable[[Sequence[Any]], dict[int, Any]] | None = None,
    **how: Any,
) -> Any:
    """An event whose errors become messages. If the message panel is no output yet, it is cleared on success, unless
    nobody did anything: what follows from a change must not take away what was said about it."""
    passive = getattr(event, "event_name", "") in ("change", "tick", "load")
    own = next((i for i, o in enumerate(outputs) if o is message), None)
    every = outputs if own is not None else [*outputs, message]

    def failed(error: Exception, values: Sequence[Any]) -> Any:
        answer = [gr.skip()] * len(every)
        for place, value in (on_error(values) if on_error else {}).items():
            answer[place] = value
        answer[len(outputs) if own is None else own] = explained(error)
        return _alone(answer)

    def fine(result: Any) -> Any:
        answer = as_tuple(result, len(outputs))
        return _alone([*answer, gr.skip() if passive else ""] if own is None else list(answer))

    def call(*values: Any) -> Any:
        try:
            return fine(fn(*values))
        except Exception as error:
            return failed(error, values)

    def stream(*values: Any) -> Any:
        try:
            for result in fn(*values):
                yield fine(result)
        except Exception as error:
            yield failed(error, values)

    handler = stream if inspect.isgeneratorfunction(fn) else call
    return event(with_event_data(handler, fn, None), inputs, every, **{**HIDDEN, **how})


def explained(error: Exception) -> str:
    """The message for any error. One of ours that nobody foresaw goes to the log, with an id to find it by."""
    if isinstance(error, AmalgamError):
        return cards.error_message(error)
    number = secrets.token_hex(4)
    log.error("error %s", number, exc_info=error)
    what = f"This did not work, because of a bug (report {number})."
    return cards.message("problem", what, "", "The details are in the terminal that Amalgam was started from.")


def listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple | set) else [value]


def as_tuple(result: Any, count: int) -> tuple[Any, ...]:
    if count == 1 and not (isinstance(result, tuple) and len(result) == 1):
        return (result,)
    if result is None and count == 0:
        return ()
    assert isinstance(result, list | tuple) and len(result) == count, f"{count} values expected, not {result!r}"
    return tuple(result)


def _alone(answer: list[Any]) -> Any:
    return answer[0] if len(answer) == 1 else tuple(answer)


def with_event_data(handler: Callable[..., Any], fn: Callable[..., Any], at: int | None) -> Callable[..., Any]:
    """``handler(*values)`` with the parameter in which Gradio puts the event's data or the request, if ``fn`` has one.

    Gradio finds it by its annotation and puts it at its place, so the handler must show it at the same one: ``at``
    values are the shell's, then come those of ``fn`` without its draft; None: the same as ``fn``."""
    inner = fn.func if isinstance(fn, functools.partial) else fn
    try:
        hints = typing.get_type_hints(inner)
    except (NameError, TypeError):
        hints = {}
    names = [p.name for p in inspect.signature(fn).parameters.values()]
    special = [name for name in names if _is_special(hints.get(name))]
    if not special:
        return handler
    shift = 0 if at is None else at - 1
    order = [f"_{i}" for i in range(shift)] + names
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD

    if inspect.isgeneratorfunction(handler):

        def wrapped(*values: Any) -> Any:
            yield from handler(*values)
    else:

        def wrapped(*values: Any) -> Any:
            return handler(*values)

    wrapped.__signature__ = inspect.Signature([inspect.Parameter(n, kinds) for n in order])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {n: hints[n] for n in special}
    return wrapped


def _is_special(hint: Any) -> bool:
    return hint in SPECIAL or (inspect.isclass(hint) and issubclass(hint, gr.EventData | gr.Request))
