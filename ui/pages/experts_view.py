"""What the Experts page shows: cards of base and experts, and what the doctor found, as HTML of a draft."""

from __future__ import annotations

from typing import Any

from merging.preflight import Preflight
from merging.preflight_fixes import Check, Fix

from ..components.actions import button, field
from ..components.cards import duration, size, text
from ..components.model_picker import facts_line, hub_link
from ..context import App
from ..draft import Draft, is_on, label_of
from ..permits import is_demo
from .experts_edit import takes_weight, usual_weight, weight_of
from .experts_look import Looks, reference_of

WORDS = {"problem": "Problem", "warning": "Warning", "note": "Note", "ok": "Fits"}
SIGNS = {"problem": "✕", "warning": "!", "note": "i", "ok": "✓"}


def model_cards(app: App, draft: Draft, looks: Looks) -> str:
    """Base and experts, with everything that can be changed about them."""
    recipe = draft["recipe"]
    experts = recipe["experts"]
    if not experts and not recipe.get("base"):
        return ""
    parts = [_base_card(app, recipe.get("base"), looks)]
    parts += [_expert_card(app, draft, i, looks) for i in range(len(experts))]
    if not experts:
        parts.append('<li class="hint">No expert yet: add the models that were fine-tuned from this base.</li>')
    weighed = "" if takes_weight(draft) else '<p class="hint">The chosen method has no weights.</p>'
    return f'<ol class="models" aria-label="Base and experts">{"".join(parts)}</ol>{weighed}'


def _base_card(app: App, base: Any, looks: Looks) -> str:
    if not base:
        return '<li class="hint">No base yet: choose the model that the experts were fine-tuned from.</li>'
    title = _short(reference_of(base))
    return (
        f'<li class="item model base"><div class="model-head"><span class="badge role">Base</span><b>{text(title)}</b>'
        f'<span class="item-actions">{button("remove-base", "base", "Remove", name="Remove the base")}</span></div>'
        f"{_facts(app, base, looks)}</li>"
    )


def _expert_card(app: App, draft: Draft, place: int, looks: Looks) -> str:
    experts = draft["recipe"]["experts"]
    expert = experts[place]
    label, last = label_of(expert), len(experts) - 1
    on = is_on(draft, label)
    shown = expert.get("name") or ""
    checked = "checked" if on else ""
    hint = _short(label).replace('"', "")
    weight = _weight(draft, expert, label) if takes_weight(draft) else ""
    buttons = (
        button("up", label, "↑", name=f"Move {label} up", why_not="It is the first." if place == 0 else "")
        + button("down", label, "↓", name=f"Move {label} down", why_not="It is the last." if place == last else "")
        + button("remove", label, "Remove", name=f"Remove {label}")
    )
    return (
        f'<li class="item model{"" if on else " off"}"><div class="model-head">'
        f'<label class="switch">{field("on", label, "1", f"{label} takes part", kind="checkbox", more=checked)}'
        f"<span>{'on' if on else 'off'}</span></label>"
        f'{field("rename", label, shown, f"Name of {label}", more=f"""placeholder="{text(hint)}" maxlength="64" """)}'
        f'{weight}<span class="item-actions">{buttons}</span></div>{_facts(app, expert, looks)}</li>'
    )


def _weight(draft: Draft, expert: dict[str, Any], label: str) -> str:
    weight, usual = weight_of(expert), usual_weight(draft)
    if weight is not None and type(weight) not in (int, float):
        return '<span class="quiet">weight by layer: see the Merge page</span>'
    value = "" if weight is None else f"{weight:g}"
    more = f'step="0.05" placeholder="{text("not set" if usual is None else f"{usual:g}")}"'
    typed = field("weight", label, value, f"Weight of {label}", kind="number", more=more)
    return f'<label class="weight">weight {typed}</label>'


def _facts(app: App, model: Any, looks: Looks) -> str:
    reference, known = reference_of(model), looks.known(model)
    adapter = model.get("adapter") if isinstance(model, dict) else None
    source = source_of(app, adapter or reference)
    on = f" on {text(_short(model['model']))}" if adapter else ""
    if known is None:
        absent = " · not looked at yet" if "href" in source else ""
        return f'<p class="source">{source}{on}{absent}</p>'
    facts, where = known
    kind = {"folder": "folder", "file": "one file", "adapter": "LoRA adapter"}[facts.kind]
    if "@" in where:
        kind = f"Hub, commit {text(where.split('@')[-1][:12])}" + (", adapter" if adapter else "")
    bases = ", ".join(text(name) for name in facts.bases[:3])
    made = f"made from {bases}" if bases else ""
    line = " · ".join(filter(None, (kind, *facts_line(facts), made)))
    return f'<p class="source">{source}{on}</p><p class="quiet">{line}</p>'


def source_of(app: App, reference: str) -> str:
    """Where a model is from, as HTML: a name on the Hub as a link, a path as it is (on a Space: its name)."""
    if is_demo(reference):
        return f"comes with Amalgam: {text(_short(reference))}"
    if reference.startswith(("/", "~", ".")) or "\\" in reference:
        return text(_short(reference)) if app.on_space else text(reference)
    if reference.count("/") == 1 and " " not in reference:
        return hub_link(reference, reference)
    return text(reference)


def _short(reference: str) -> str:
    return reference.replace("\\", "/").rstrip("/").split("/")[-1] or reference


# -- the doctor ---------------------------------------------------------------------------------------------------


def doctor(found: Preflight | None) -> str:
    """The findings: problems first, what fits folded away. None: they are being looked for."""
    if found is None:
        return '<p class="hint" role="status">Looking at the headers…</p>'
    good = [check for check in found.checks if check.finding.severity == "ok" or check.settled]
    items = "".join(_check(check) for check in found.checks if check not in good)
    fine = "".join(map(_check, good))
    folded = (
        f'<details data-key="fine"><summary>{len(good)} checks passed or settled</summary>'
        f'<ul class="checks">{fine}</ul></details>'
        if good
        else ""
    )
    listed = f'<ul class="checks">{items}</ul>' if items else ""
    return f'<div class="doctor"><p role="status">{_summary(found)}</p>{listed}{folded}{_cost(found)}</div>'


def _summary(found: Preflight) -> str:
    if not found.checks:
        return "One model alone: there is nothing to compare yet."
    counts = {s: sum(c.finding.severity == s and not c.settled for c in found.checks) for s in WORDS}
    words = [f"{counts[s]} {s}{'s' if counts[s] > 1 else ''}" for s in ("problem", "warning", "note") if counts[s]]
    if not words:
        return '<b class="ok">✓ Nothing stands in the way.</b> Told from headers; no weight was read.'
    if counts["problem"]:
        return f'<b class="problem">{" · ".join(words)}.</b> Settle the problems before you merge.'
    return f"<b>{' · '.join(words)}.</b> Nothing stands in the way of a merge."


def fix_key(check: Check, fix: Fix) -> str:
    """Names a remedy, so that a click on one that is gone meanwhile does nothing else."""
    return f"{check.finding.code}|{check.who}|{fix.label}"


def _check(check: Check) -> str:
    finding, severity = check.finding, "ok" if check.settled else check.finding.severity
    settled = f'<p class="ok">Settled: {text(check.settled)}.</p>' if check.settled else ""
    fixes = "".join(button("fix", fix_key(check, fix), fix.label) for fix in check.fixes)
    lines = "".join(f"<p>{text(line)}</p>" for line in (finding.evidence, finding.remedy) if line)
    code = f' <span class="code">{text(finding.code)}</span>' if finding.code.startswith("E_") else ""
    return (
        f'<li class="item check {severity}"><p><span class="sign" aria-hidden="true">{SIGNS[severity]}</span>'
        f"<b>{WORDS[severity]}:</b> {text(finding.title)}{code}</p>{lines}{settled}"
        f'{f"""<div class="item-actions">{fixes}</div>""" if fixes else ""}</li>'
    )


def _cost(found: Preflight) -> str:
    if not found.cost:
        return ""
    cost = found.cost
    return (
        f'<p class="quiet">This merge reads {size(cost["bytes_read"])} and writes {size(cost["bytes_written"])}; '
        f"it needs about {size(cost['memory'])} of memory and {duration(cost['seconds'])} on one core.</p>"
    )
