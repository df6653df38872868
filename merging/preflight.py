"""The check before the flight: everything that headers and side files tell about a recipe, before a weight moves.

The loudest complaint about merging tools is the mistake that shows after an hour of downloading. So this works on a
recipe that is not finished, on models that are not here yet, and never raises: what cannot be opened is a finding like
any other, with what to do about it, and where a change of the recipe would do, with that change (``preflight_fixes``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from .alike import PIECES, alike
from .analysis.doctor_files import examine_files
from .analysis.finding import SEVERITIES, Finding, some
from .analysis.models import BASE, MERGED, Models, compare
from .checkpoints.checkpoint import Checkpoint, open_checkpoint
from .checkpoints.disk import free_bytes, no_space
from .checkpoints.hub import Resolved
from .checkpoints.hub_cache import find_here
from .checkpoints.hub_headers import HEADERS_ONLY
from .checkpoints.side_files import _template as chat_template
from .errors import AmalgamError, HubError, RecipeError
from .methods import METHODS, get_method
from .model_facts import ModelFacts, describe
from .plan import make_plan
from .preflight_fixes import Check, Fix, take_out, with_fixes
from .recipe import Recipe
from .recipe_parts import Expert

STRUCTURE = {"E_SHAPE", "E_MISSING_TENSOR", "E_EXTRA_TENSOR"}
"""Blockers that say more clearly what the doctor's finding about tensors says."""
Find = Callable[[str], Resolved]


@dataclass
class Preflight:
    """``facts``: of the models that could be read, by "base" and the experts' labels; an adapter's are its own.
    ``cost``: of the merge, if it could be planned: bytes_read, bytes_written, memory, seconds, parameters."""

    checks: list[Check] = field(default_factory=list)
    facts: dict[str, ModelFacts] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    """What was opened: a path, or ``org/name@commit``."""
    reference: dict[str, str] = field(default_factory=dict)
    """What the recipe calls it."""
    errors: dict[str, AmalgamError] = field(default_factory=dict)
    cost: dict[str, Any] | None = None
    absent: list[str] = field(default_factory=list)
    """References to the Hub of which nothing is here."""
    headers_only: list[str] = field(default_factory=list)
    """And those of which only headers are here, so that their weights are to be downloaded."""

    @property
    def worst(self) -> str:
        return min((c.finding.severity for c in self.checks if not c.settled), key=SEVERITIES.index, default="ok")

    def add(self, check: Check) -> None:
        self.checks.append(check)


def preflight(data: Mapping[str, Any], *, find: Find = find_here, out: Path | None = None) -> Preflight:
    """Look at the recipe ``data`` (a Recipe's fields, perhaps not all). ``find``: where a model lies; it must not read
    weights. ``out``: where it would be written, to see the free disk space."""
    done = Preflight()
    find = _noting(find, done)
    experts = [Expert.model_validate(expert) for expert in data.get("experts", [])]
    with ExitStack() as stack:
        opened = _open_all(data, experts, find, stack, done)
        if BASE not in opened and BASE not in done.errors:
            _no_base(data, experts, done)
        _other_bases(data, experts, done)
        _downloads(done)
        _same_files(opened, done)
        left_out = {*_misfits(opened, done), *done.errors}
        fitting = [expert for expert in experts if expert.label not in left_out]
        if BASE in opened and fitting:
            _doctor(data, {who: opened[who] for who in (BASE, *(e.label for e in fitting))}, fitting, done)
    if fitting and BASE not in left_out:
        _plan(data, [expert.label for expert in fitting], find, out, done)
    done.checks.sort(key=lambda check: (bool(check.settled), SEVERITIES.index(check.finding.severity)))
    return done


# -- opening ------------------------------------------------------------------------------------------------------


def _open_all(
    data: Mapping[str, Any], experts: list[Expert], find: Find, stack: ExitStack, done: Preflight
) -> dict[str, Checkpoint]:
    """The models that can be opened, by BASE and label; what cannot is a check. Adapters are opened on their model."""
    parts = [(BASE, Expert.model_validate(data["base"]))] if data.get("base") else []
    parts += [(expert.label, expert) for expert in experts]
    plain: dict[str, Checkpoint] = {}
    opened: dict[str, Checkpoint] = {}
    for who, part in parts:
        try:
            found = find(part.model)
            if part.model not in plain:
                plain[part.model] = stack.enter_context(open_checkpoint(found.path, part.model))
            model, done.reference[who] = plain[part.model], part.adapter or part.model
            if part.adapter is not None:
                found = find(part.adapter)
                done.facts[who], done.where[who] = describe(found.path), found.reference
                model = stack.enter_context(open_checkpoint(found.path, part.key, base=model))
            else:
                done.facts[who], done.where[who] = describe(found.path), found.reference
            opened[who] = model
        except AmalgamError as error:
            done.errors[who] = error
            if error.code != "E_HUB_OFFLINE":
                done.add(_unopened(who, part, error))
    return opened


def _noting(find: Find, done: Preflight) -> Find:
    """``find``, which notes what is not here."""

    def found(text: str) -> Resolved:
        try:
            result = find(text)
        except HubError as error:
            if error.code == "E_HUB_OFFLINE" and text not in done.absent:
                done.absent.append(text)
            raise
        if HEADERS_ONLY in result.warnings and text not in done.headers_only:
            done.headers_only.append(text)
        return result

    return found


def _downloads(done: Preflight) -> None:
    """What must be brought from the Hub: told once for all models."""
    if done.absent:
        names = "\n".join(done.absent)
        what = f"Not on this computer yet: {some(done.absent)}."
        remedy = "Look at the headers first: that shows whether the models fit, and how much there is to download."
        ways = (Fix("Look at the headers on the Hub", "headers", names), Fix("Download", "download", names))
        done.add(Check(Finding("absent", "problem", what, "", None, remedy, "files"), "", ways))
    if done.headers_only:
        what = f"Still on the Hub: {some(done.headers_only)}."
        evidence = "Only headers were looked at. The weights are downloaded when they are needed, or now."
        now = Fix("Download now", "download", "\n".join(done.headers_only))
        done.add(Check(Finding("remote", "note", what, evidence, None, ""), "", (now,)))


def _unopened(who: str, part: Expert, error: AmalgamError) -> Check:
    fixes: list[Fix] = []
    if who != BASE:
        if error.code == "E_ADAPTER" and part.adapter is None:
            fixes.append(Fix("Use it as an adapter of the base", "adapter", who))
        fixes += take_out(who)
    about = "The base" if who == BASE else who
    return Check(_from_error(error, f"{about}: "), who, tuple(fixes))


def _from_error(error: AmalgamError, prefix: str = "") -> Finding:
    return Finding(error.code, "problem", f"{prefix}{error.what}", error.why, None, error.fix)


# -- the base -----------------------------------------------------------------------------------------------------


def _stated(experts: list[Expert], done: Preflight) -> dict[str, list[str]]:
    """Base that is named by cards and configurations -> the experts that name it."""
    found: dict[str, list[str]] = {}
    for expert in experts:
        facts = done.facts.get(expert.label)
        for name in facts.bases if facts else ():
            found.setdefault(name, []).append(expert.label)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _no_base(data: Mapping[str, Any], experts: list[Expert], done: Preflight) -> None:
    method = data.get("method")
    if not experts or (method in METHODS and not get_method(method).uses_base):
        return
    stated = _stated(experts, done)
    evidence = "; ".join(f"{', '.join(who)}: made from {name}" for name, who in list(stated.items())[:3])
    fix = "Choose the model that the experts were trained from."
    finding = Finding("no_base", "problem" if method else "warning", "There is no base yet.",
                      f"{evidence}." if evidence else "Most methods merge what each expert changed in a common base.",
                      None, fix, "files")  # fmt: skip
    done.add(Check(finding, BASE, tuple(Fix(f"Use {name} as the base", "base", name) for name in list(stated)[:3])))


def _other_bases(data: Mapping[str, Any], experts: list[Expert], done: Preflight) -> None:
    """Do cards or configurations name another base than the one that was chosen?"""
    if BASE not in done.facts:
        return
    base = Expert.model_validate(data["base"]).model
    mine = {_last(done.where[BASE]), _last(base), *map(_last, done.facts[BASE].bases)}
    for name, who in _stated([e for e in experts if e.adapter is None], done).items():
        named = {_last(n) for label in who for n in done.facts[label].bases}
        if named & mine:
            continue
        severity = "note" if Path(done.where[BASE]).exists() else "warning"
        finding = Finding(
            "card_base", severity, f"The card of {', '.join(who)} names another base.",
            f"It says {name}; the recipe has {done.where[BASE]}.", None,
            "If they are different models, what the experts changed is measured against the wrong one.", "files",
        )  # fmt: skip
        done.add(Check(finding, who[0], (Fix(f"Use {name} as the base", "base", name),)))


# -- do they fit? -------------------------------------------------------------------------------------------------


def _misfits(opened: Mapping[str, Checkpoint], done: Preflight) -> list[str]:
    """Experts of another kind or size than the base (without a base: than the first of them)."""
    first, found = next(iter(opened), BASE), []
    for who in list(opened)[1:]:
        facts, other = _whole(opened[who], done.facts[who]), _whole(opened[first], done.facts[first])
        differing = [
            text.format(getattr(facts, key), getattr(other, key), first=_called(first))
            for key, text in (
                ("model_type", "it is of the type {}, {first} is {}"),
                ("blocks", "it has {} layers, {first} has {}"),
                ("width", "its layers are {} wide, those of {first} {}"),
            )
            if getattr(facts, key) and getattr(other, key) and getattr(facts, key) != getattr(other, key)
        ]
        if not differing:
            continue
        found.append(who)
        named = [n for n in done.facts[who].bases if first == BASE and n != done.reference[BASE]]
        remedy = "Remove it, or choose its own base" + (f": its card names {named[0]}." if named else ".")
        what = f"{who} does not fit {_called(first)}."
        finding = Finding("fit", "problem", what, _sentence(differing), None, remedy)
        fixes = (*take_out(who), *(Fix(f"Use {name} as the base", "base", name) for name in named[:2]))
        done.add(Check(finding, who, fixes))
    return found


def _whole(model: Checkpoint, facts: ModelFacts) -> ModelFacts:
    """The facts of the model that an adapter changes, or of the model itself."""
    return describe(model.base.path) if model.base is not None else facts


def _called(who: str) -> str:
    return "the base" if who == BASE else who


def _sentence(parts: list[str]) -> str:
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}."


def _same_files(opened: Mapping[str, Checkpoint], done: Preflight) -> None:
    """Models that are twice in the recipe, under one name or two. Equal headers, then samples of the bytes."""
    told: set[str] = set()
    for first, second in combinations(opened, 2):
        if second in told or opened[first].kind == "adapter" or opened[second].kind == "adapter":
            continue
        readable = not {done.reference[first], done.reference[second]} & {*done.headers_only}
        same = opened[first] is opened[second] or (readable and alike(opened[first], opened[second]))
        if same:
            told.add(second)
            evidence = "They are the same files." if opened[first] is opened[second] else (
                f"Their headers are equal, and so are {PIECES} samples of the weights."
            )  # fmt: skip
            remedy = "There is nothing to merge from it: take it out." if first == BASE else "It would count twice."
            what = f"{second} equals {_called(first)}."
            finding = Finding("same", "warning", what, evidence, None, remedy, "sampled")
            done.add(Check(finding, second, take_out(second)))


# -- the doctor, and the plan -------------------------------------------------------------------------------------


def _doctor(data: Mapping[str, Any], opened: dict[str, Checkpoint], experts: list[Expert], done: Preflight) -> None:
    people = {f"{who} (expert)" if who == MERGED else who: model for who, model in opened.items()}
    names = [who for who in people if who != BASE]
    try:
        tensors, skipped, notes = compare(people)
        where = {"base": done.where[BASE], "experts": [done.where[e.label] for e in experts], "merged": None}
        findings = examine_files(Models(where, names, tensors, skipped, notes, people, ""))
    except AmalgamError as error:
        done.add(Check(_from_error(error)))
        return
    templates = [who for who, model in people.items() if chat_template(_side_folder(model))]
    adapters = list(_stated([e for e in experts if e.adapter is not None], done))
    done.checks += [with_fixes(finding, data, templates, adapters) for finding in findings]


def _side_folder(model: Checkpoint) -> Path:
    return model.base.path if model.base is not None and not chat_template(model.path) else model.path


def _plan(data: Mapping[str, Any], fitting: list[str], find: Find, out: Path | None, done: Preflight) -> None:
    """What the plan of the models that fit says. A recipe without a method yet is planned with the simplest one."""
    experts = [expert for expert in data["experts"] if Expert.model_validate(expert).label in fitting]
    whole = len(experts) == len(data["experts"])
    data = {**data, "experts": experts}
    if unnamed := not data.get("method"):
        simple = {"method": "task_arithmetic" if data.get("base") else "linear", "parameters": {"weight": 1.0}}
        data = {**data, **simple, "experts": [{**expert, "parameters": {}} for expert in experts]}
    facts: dict[str, Any] = {}
    try:
        with make_plan(Recipe.parse(data), offline=True, find=find) as plan:
            blockers, warnings, facts = plan.blockers, plan.warnings, plan.as_dict()
    except AmalgamError as error:
        blockers, warnings = [error] if whole or not isinstance(error, RecipeError) else [], []
    known = {check.finding.code for check in done.checks}
    if {b.code for b in blockers} & STRUCTURE:
        done.checks = [check for check in done.checks if check.finding.code != "tensors"]
    elif facts:
        done.checks = [_settled_by_policy(check) for check in done.checks]
    for blocker in blockers:
        if not ("same" in known and blocker.code == "E_RECIPE_INPUTS"):
            done.add(with_fixes(_from_error(blocker), data, (), ()))
    for text in warnings:
        if unnamed or text == HEADERS_ONLY:
            continue
        if not ("different data types" in text and "dtype" in known) and not text.endswith("are the same files."):
            done.add(Check(Finding("plan", "warning", text, "", None, "")))
    if not facts or blockers or not whole:
        return
    done.cost = {key: facts[key] for key in ("bytes_read", "bytes_written", "memory", "seconds", "parameters")}
    room = free_bytes(out) if out is not None else None
    if out is not None and room is not None and room < facts["bytes_written"]:
        done.add(Check(_from_error(no_space(out, facts["bytes_written"]))))


def _settled_by_policy(check: Check) -> Check:
    """Tensors that are not in all models, where the plan knows what to do with them."""
    if check.finding.code != "tensors" or check.finding.severity != "warning":
        return check
    return Check(check.finding, check.who, (), "The recipe says what happens to them")


def _last(reference: str) -> str:
    return reference.split("@")[0].rstrip("/").split("/")[-1].lower()
