"""Single items: what was asked, what would have been right, and what every model answered, side by side."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from merging.errors import AmalgamError
from merging.evaluation.items import ChoiceItem, Item, TextItem, TextLabelItem
from merging.evaluation.records import METRICS, Record
from merging.evaluation.tasks import read_task_file

from ..components.cards import text
from ..components.text_table import Markup, table
from ..scored import Scored, overview

FILTERS = ("all items", "models disagree", "wrong by", "right by")
PER_PAGE = 50


def texts_of(paths: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Id of an item -> (question, right answer), from task files as they are now."""
    found: dict[str, tuple[str, str]] = {}
    for path in paths:
        try:
            status = os.stat(path)
            files = [path] if not os.path.isdir(path) else [str(f) for f in sorted(Path(path).iterdir())]
            for file in files:
                found |= _texts(file, status.st_mtime_ns, status.st_size)
        except OSError:
            continue
    return found


@lru_cache(maxsize=32)
def _texts(path: str, changed: int, size: int) -> dict[str, tuple[str, str]]:
    try:
        return {item.id: _both(item) for task in read_task_file(Path(path)) for item in task.items}
    except AmalgamError:
        return {}


def _both(item: Any) -> tuple[str, str]:
    if isinstance(item, Item):
        return item.prompt, item.answer
    if isinstance(item, ChoiceItem):
        return f"{item.prompt}  [{' | '.join(item.choices)}]", item.choices[item.answer]
    if isinstance(item, TextLabelItem):
        return item.text, str(item.label)
    if isinstance(item, TextItem):
        return item.text, ""
    return f"image {item.line}", str(getattr(item, "label", ""))


def by_item(scored: Scored, split: str, task: str) -> tuple[list[str], str, dict[str, dict[str, Record]]]:
    """Models, metric, and item -> model -> record, of one task."""
    tables = [one for one in overview(scored, split).tables if one.task == task]
    if not tables:
        return [], "", {}
    metric, models = tables[0].metric.name, list(tables[0].models)
    keys = {scored.models[name]: name for name in models}
    same = {name: next(n for n in models if scored.models[n] == scored.models[name]) for name in models}
    found: dict[str, dict[str, Record]] = {}
    for record in scored.records(split):
        if record.task == task and record.metric == metric and record.model in keys:
            found.setdefault(record.item, {})[same[keys[record.model]]] = record
    for answers in found.values():
        answers |= {name: answers[first] for name, first in same.items() if first in answers}
    return models, metric, found


def chosen_items(
    found: dict[str, dict[str, Record]], texts: dict[str, tuple[str, str]], show: str, model: str, words: str
) -> list[str]:
    """Ids of the items that pass the filters, in the order of the records."""

    def passes(item: str, answers: dict[str, Record]) -> bool:
        mine = answers.get(model)
        if show == "models disagree" and len({record.score for record in answers.values()}) < 2:
            return False
        if show == "wrong by" and (mine is None or mine.score == 1):
            return False
        if show == "right by" and (mine is None or mine.score != 1):
            return False
        if not words.strip():
            return True
        everything = [*texts.get(item, ()), *(record.answer for record in answers.values())]
        return any(words.strip().lower() in one.lower() for one in everything)

    return [item for item, answers in found.items() if passes(item, answers)]


def items_table(
    scored: Scored, split: str, task: str, paths: Sequence[str], show: str, model: str, words: str, page: int
) -> tuple[str, int]:
    """A page of the table, and how many pages there are."""
    models, metric, found = by_item(scored, split, task)
    if not models:
        return '<p class="reading">No single items here: choose a task.</p>', 1
    texts, binary = texts_of(paths), METRICS[metric].kind == "binary"
    chosen = chosen_items(found, texts, show, model, words)
    pages = max(1, -(-len(chosen) // PER_PAGE))
    page = min(max(1, page), pages)
    first = (page - 1) * PER_PAGE
    rows = []
    for item in chosen[first : first + PER_PAGE]:
        question, right = texts.get(item, (f"item {item}", ""))
        rows.append([question, right or None, *(_answer(found[item].get(name), binary) for name in models)])
    wrongs = [sum(found[item][name].score != 1 for item in chosen if name in found[item]) for name in models]
    heads = [
        Markup(f"{text(name)}<br><small>{wrong} wrong</small>") if binary else name
        for name, wrong in zip(models, wrongs, strict=True)
    ]
    last = min(first + PER_PAGE, len(chosen))
    caption = f"{task}: items {first + 1} to {last} of {len(chosen)}" if chosen else f"{task}: no item fits the filters"
    note = "" if texts else _NO_TEXTS
    return note + table(["Question", "Right answer", *heads], rows, caption, wide=True), pages


_NO_TEXTS = '<p class="reading">The task file is not where it was: questions are shown by their ids.</p>'


def _answer(record: Record | None, binary: bool) -> Any:
    if record is None:
        return None
    if not binary:
        return f"{record.score:.4g}"
    right = record.score == 1
    mark = '<span class="right">✓<span class="sr"> right</span></span>' if right else (
        '<span class="wrong">✗<span class="sr"> wrong</span></span>'
    )  # fmt: skip
    return Markup(f"{mark} {text(record.answer)}")
