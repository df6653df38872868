"""What a merge will do and cost, from the headers of its inputs: in words, before anything is started."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from merging.checkpoints.disk import free_bytes, no_space
from merging.cores import available_cores
from merging.errors import AmalgamError
from merging.explain import Explanation, explain
from merging.plan import Plan, make_plan

from ..components.cards import duration, size, text
from ..context import App
from ..draft import Draft, active, recipe_of
from ..machine import machine
from ..permits import check_permitted

KEPT, SECONDS = 4, 60.0
"""So many plans are remembered, for so long: files may change."""
MOST_GROUPS = 12
OUTSIDE = "outside of the layers"


@dataclass(frozen=True, slots=True)
class Look:
    """A plan, or why there is none. ``layers``: names of the tensors of each layer; ``outside``: of all others."""

    plan: Plan | None = None
    problem: AmalgamError | None = None
    layers: list[list[str]] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    @property
    def firsts(self) -> list[str]:
        """One tensor of each layer: a matrix if there is one, since norms are often left out."""
        return [names[0] for names in self.layers]

    @property
    def blocker(self) -> AmalgamError | None:
        return self.problem or (self.plan.blockers[0] if self.plan and self.plan.blockers else None)


_kept: OrderedDict[str, tuple[float, Look]] = OrderedDict()
_lock = threading.Lock()


def look(app: App, draft: Draft) -> Look:
    """The plan of a draft's recipe. Headers are read, weights are not, and nothing is downloaded."""
    key = json.dumps(active(draft), sort_keys=True)
    with _lock:
        at, known = _kept.get(key, (0.0, None))
    if known is not None and time.monotonic() - at < SECONDS:
        return known
    try:
        check_draft(app, draft)
        recipe = recipe_of(draft)
        with make_plan(recipe, offline=True) as plan:
            found = Look(plan, None, *_by_layer(plan))
    except AmalgamError as error:
        found = Look(problem=error)
    if found.plan is not None:  # a problem may be gone a second later
        with _lock:
            _kept[key] = (time.monotonic(), found)
            while len(_kept) > KEPT:
                _kept.popitem(last=False)
    return found


def check_draft(app: App, draft: Draft) -> None:
    """InputError E_PATH for models and tasks that strangers may not name."""
    models = [m for m in recipe_of(draft).model_list]
    for reference in (*(m.model for m in models), *(m.adapter for m in models if m.adapter), *draft["tasks"]):
        check_permitted(app, reference)


def _by_layer(plan: Plan) -> tuple[list[list[str]], list[str]]:
    layers: dict[int, list[Any]] = {}
    outside = []
    for tensor in plan.tensors:
        if tensor.block is None:
            outside.append(tensor.name)
        else:
            layers.setdefault(tensor.block, []).append(tensor)
    ordered = [sorted(layers[block], key=lambda t: len(t.shape) < 2) for block in sorted(layers)]
    return [[t.name for t in tensors] for tensors in ordered], outside


# -- words --------------------------------------------------------------------------------------------------------


def estimate_card(app: App, found: Look) -> str:
    """Tensors, memory, disk, time; what stands in the way, what to mind; and the effective coefficients."""
    if found.plan is None:
        problem = found.problem
        assert problem is not None
        lines = "".join(f"<p>{text(line)}</p>" for line in (problem.why, problem.fix) if line)
        return (
            '<section class="card" aria-label="Plan"><h4>Plan</h4>'
            f'<p class="state problem">{text(problem.what)}</p>{lines}</section>'
        )
    plan, threads = found.plan, app.threads or available_cores()
    counts = {"merge": 0, "copy": 0, "equal": 0}
    for tensor in plan.tensors:
        counts[tensor.action] += 1
    facts = machine(app.data)
    memory = plan.memory(threads)
    enough = facts.memory_free is None or memory <= facts.memory_free
    copied = counts["copy"] + counts["equal"]
    rows = [
        ("Tensors", f"{counts['merge']:,} merged" + (f", {copied:,} copied" if copied else "")),
        ("Weights", f"{sum(t.numel for t in plan.tensors):,}"),
        ("Memory", f"{size(memory)} at most" + ("" if enough else f", only {size(facts.memory_free)} are free")),
        ("Disk", f"reads {size(plan.bytes_read)}, writes {size(plan.bytes_written)}"),
        ("Time", f"about {duration(plan.seconds(threads))} with {threads} core{'s' if threads != 1 else ''}"),
    ]
    items = "".join(f"<dt>{name}</dt><dd>{text(value)}</dd>" for name, value in rows)
    blockers = "".join(
        f'<p class="state problem">{text(b.what)}</p><p>{text(b.why)} {text(b.fix)}</p>' for b in blockers_of(app, plan)
    )
    warnings = "".join(f'<p class="warning">{text(w)}</p>' for w in (*plan.warnings, *plan.alignment.notes))
    return (
        f'<section class="card" aria-label="Plan"><h4>Plan</h4><dl>{items}</dl>{blockers}{warnings}'
        f"{_coefficients(plan)}</section>"
    )


def blockers_of(app: App, plan: Plan) -> list[AmalgamError]:
    """What stands in the way of writing this plan's result into the data folder."""
    found = list(plan.blockers)
    there = next(p for p in (app.data, *app.data.parents) if p.exists())
    free = free_bytes(there)
    if free is not None and free < plan.bytes_written:
        found.append(no_space(app.data, plan.bytes_written))
    return found


def _coefficients(plan: Plan) -> str:
    """What each group of tensors really gets, with gradients, filters and normalisation worked out."""
    groups = plan.coefficients()
    if not groups:
        return ""
    names = [expert.label.rstrip("/").rsplit("/", 1)[-1] for expert in plan.recipe.experts]
    some = groups[:MOST_GROUPS]
    rows = "".join(f"<tr>{_group(group, names)}</tr>" for group in some)
    more = f"<p>{len(groups) - len(some)} more groups.</p>" if len(groups) > len(some) else ""
    summary = "one set for all tensors" if len(groups) == 1 else f"{len(groups)} different sets"
    return (
        f'<details class="figures"><summary>Effective coefficients: {summary}</summary><div class="scroll"><table>'
        '<thead><tr><th scope="col">Tensors</th><th scope="col">Settings</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{more}</details>"
    )


def _group(group: dict[str, Any], names: Sequence[str]) -> str:
    examples = "".join(f"<br><code>{text(name)}</code>" for name in group["examples"][:1])
    shared = ", ".join(f"{_symbol(k)} {_short(v)}" for k, v in group["shared"].items())
    lines = [shared] if shared else []
    for i, settings in enumerate(group["experts"]):
        name = names[i] if i < len(names) else str(i + 1)
        own = ", ".join(f"{_symbol(k)} {_short(v)}" for k, v in settings.items())
        factor = f" → ×{_short(group['effective'][i])}" if group["effective"] else ""
        lines.append(f"{name}: {own}{factor}")
    return f'<th scope="row">{group["tensors"]:,}{examples}</th><td>{"<br>".join(map(text, lines))}</td>'


def formula_card(found: Look, tensor: str | None) -> str:
    """What is done to one tensor, with its numbers."""
    if found.plan is None or not tensor:
        return (
            '<section class="card quiet" aria-label="Formula"><h4>Formula</h4>'
            "<p>Shown as soon as the recipe can be planned.</p></section>"
        )
    try:
        known = explain(found.plan, tensor)
    except AmalgamError as error:
        return f'<section class="card" aria-label="Formula"><h4>Formula</h4><p>{text(error.what)}</p></section>'
    return _formula(known)


def _formula(known: Explanation) -> str:
    where = "".join(f"<li>{text(line)}</li>" for line in known.where)
    values = "".join(
        f"<tr><th scope='row'>{text(symbol)}</th><td>{text(meaning)}</td><td>{_short(value)}</td></tr>"
        for symbol, meaning, value in known.values
    )
    numbers = f'<details class="figures"><summary>Numbers</summary><table>{values}</table></details>' if values else ""
    shape = " × ".join(f"{n:,}" for n in known.shape) or "1"
    return (
        '<section class="card formula" aria-label="Formula"><h4>Formula</h4>'
        f"<p><code>{text(known.tensor)}</code> <small>{shape}</small></p>"
        f'<p class="equation">{text(known.text)}</p><ul>{where}</ul>'
        f"<p>{text(known.note)}</p>{numbers}</section>"
    )


def layer_choices(found: Look) -> list[tuple[str, str]]:
    """For a drop-down: each layer, and what is outside of them."""
    outside = [(OUTSIDE, "")] if found.outside else []
    return [*((f"layer {i}", str(i)) for i in range(len(found.layers))), *outside]


def tensors_in(found: Look, layer: str | None) -> list[str]:
    if layer and layer.isdigit() and int(layer) < len(found.layers):
        return found.layers[int(layer)]
    return found.outside if layer == "" else (found.layers[0] if found.layers else found.outside)


def _symbol(name: str) -> str:
    return "λ" if name == "lambda" else name


def _short(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "not set"}[value]
    return f"{value:.4g}" if isinstance(value, float | int) else str(value)
