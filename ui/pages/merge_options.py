"""Advanced choices of a merge: which tensors, number type, vocabulary, what to do with misfits, seed."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from merging.recipe_parts import Include, Policies

from ..draft import Draft, active, label_of, set_parameter
from ..shell import Shell

INCLUDE = {
    "embeddings": "Merge the embeddings",
    "head": "Merge the output head",
    "norms": "Merge the norms",
    "biases": "Merge the biases",
}
ASKED = [("as the method suggests", ""), ("yes", "yes"), ("no, keep the base's", "no")]
DTYPES = [("as in the base", ""), *((name, name) for name in ("float16", "bfloat16", "float32", "float64"))]
POLICIES = {
    "extra_tensors": (
        "Tensors that only some models have",
        {"refuse": "stop and say so", "drop": "leave them out", "copy": "copy them"},
    ),
    "missing_tensors": ("Tensors that an expert lacks", {"refuse": "stop and say so", "base": "they did not change"}),
    "non_finite": ("NaN or infinity in a model", {"refuse": "stop and say so", "propagate": "let it through"}),
    "overflow": (
        "Results too large for the number type",
        {"refuse": "stop and say so", "allow": "let them become infinite"},
    ),
}  # fmt: skip
TOKENIZER = [
    ("automatic: the base's, which all must share", ""),
    ("the base's", "base"),
    ("union of all vocabularies", "union"),
]
TEMPLATE = [("automatic: the base's", ""), ("none", "none")]


def build(shell: Shell) -> None:
    """The controls; each one shows the draft and changes it."""
    style: dict[str, Any] = {"interactive": True, "min_width": 200}
    with gr.Row(elem_classes="wrap"):
        for name, label in INCLUDE.items():
            _tie(
                shell,
                gr.Dropdown(ASKED, value="", label=label, elem_id=f"include-{name}", **style),
                ("include", name),
                _yes,
            )
    with gr.Row(elem_classes="wrap"):
        dtype = gr.Dropdown(DTYPES, value="", label="Number type of the merged weights", elem_id="merge-dtype", **style)
        _tie(shell, dtype, ("dtype",), _text)
        tokenizer = gr.Dropdown(
            TOKENIZER, value="", label="Vocabulary of the result", elem_id="merge-tokenizer", **style
        )
        shell.edit(tokenizer.input, partial(_set, ("tokenizer", "source"), _text), tokenizer)
        shell.on_draft(partial(_with_experts, TOKENIZER, ("tokenizer", "source")), tokenizer)
        template = gr.Dropdown(
            TEMPLATE, value="", label="Chat template of the result", elem_id="merge-template", **style
        )
        shell.edit(template.input, partial(_set, ("chat_template",), _text), template)
        shell.on_draft(partial(_with_experts, TEMPLATE, ("chat_template",)), template)
        seed = gr.Number(
            0, label="Seed, for methods with chance", precision=0, minimum=0, elem_id="merge-seed", **style
        )
        shell.edit(seed.input, partial(_set, ("seed",), _seed), seed)
        shell.on_draft(_seed_of, seed)
    with gr.Row(elem_classes="wrap"):
        for name, (label, words) in POLICIES.items():
            choices = [(word, value) for value, word in words.items()]
            control = gr.Dropdown(choices, value="refuse", label=label, elem_id=f"policy-{name}", **style)
            shell.edit(control.input, partial(_set, ("policies", name), _unless_refuse), control)
            shell.on_draft(partial(_policy_of, name), control)


def _tie(shell: Shell, control: Any, path: tuple[str, ...], meaning: Any) -> None:
    shell.edit(control.input, partial(_set, path, meaning), control)
    shell.on_draft(partial(_choice_of, path), control)


def _set(path: tuple[str, ...], meaning: Any, draft: Draft, value: Any) -> Draft:
    """Write one field; a part of the recipe in which nothing is left goes too."""
    new = set_parameter(draft, path, meaning(value))
    part = new["recipe"].get(path[0])
    return set_parameter(new, path[:1], None) if part == {} else new


def value_of(path: tuple[str, ...], draft: Draft) -> Any:
    place: Any = draft["recipe"]
    for step in path:
        place = place.get(step) if isinstance(place, dict) else None
    return place


def _choice_of(path: tuple[str, ...], draft: Draft) -> str:
    found = value_of(path, draft)
    return {True: "yes", False: "no", None: ""}.get(found, str(found)) if not isinstance(found, str) else found


def _policy_of(name: str, draft: Draft) -> str:
    return str(value_of(("policies", name), draft) or "refuse")


def _seed_of(draft: Draft) -> int:
    return int(value_of(("seed",), draft) or 0)


def _with_experts(choices: list[tuple[str, str]], path: tuple[str, ...], draft: Draft) -> Any:
    """The fixed choices, the experts, and what the recipe says if it is something else (text of a template)."""
    experts = [(f"of {label_of(e).rstrip('/').rsplit('/', 1)[-1]}", label_of(e)) for e in active(draft)["experts"]]
    found = value_of(path, draft)
    found = "" if found in (None, "auto") else str(found)
    listed = [*choices, *experts]
    if found not in [value for _, value in listed]:
        listed.append(("as written in the recipe", found))
    return gr.Dropdown(choices=listed, value=found)


def _yes(value: Any) -> bool | None:
    return {"yes": True, "no": False}.get(value)


def _text(value: Any) -> str | None:
    return str(value) if value else None


def _unless_refuse(value: Any) -> str | None:
    return None if value in (None, "refuse") else str(value)


def _seed(value: Any) -> int | None:
    return max(0, int(value)) or None if isinstance(value, int | float) else None


assert set(INCLUDE) == set(Include.model_fields) and set(POLICIES) == set(Policies.model_fields)
