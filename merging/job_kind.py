"""What a kind of job is: a name for people, a check of its arguments, and the function that does it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import RecipeError
from .job_pace import Tell

Event = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Kind:
    """``check(arguments)`` raises for wrong ones; ``run`` returns the result, as JSON values."""

    title: str
    check: Callable[[dict[str, Any]], None]
    run: Callable[[dict[str, Any], Path, Tell, Event, threading.Event], dict[str, Any]]


class Arguments(BaseModel):
    """Unknown arguments are errors, values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True)


NamedModel = Annotated[list[str], Field(min_length=3, max_length=3)]
"""[name, reference, role]"""
Count = Annotated[int, Field(ge=0)]
"""0: the usual number, or all"""


def parsed(cls: type[Any], arguments: dict[str, Any]) -> Any:
    """RecipeError E_RECIPE_FIELD, with the place, for what does not fit."""
    try:
        return cls.model_validate(arguments)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"]))
        what = f"The setting {place!r} of this run does not fit."
        raise RecipeError("E_RECIPE_FIELD", what, f"{problem['msg']}.", "Correct it and start again.") from None
