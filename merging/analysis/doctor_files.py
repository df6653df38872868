"""What headers and side files tell before a weight is read: do these models belong together?

Architecture and shapes, data types, tied heads, vocabularies, chat templates, and whether an adapter was made for this
base. Each check gives one ``Finding``, also where all is well: a check that nobody sees is one that nobody trusts.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..alignment import FLOATS
from ..checkpoints.checkpoint import ADAPTER_CONFIG, LARGEST_CONFIG, Checkpoint
from ..checkpoints.files import read_whole
from ..checkpoints.layout import head_and_embedding, is_tied
from ..checkpoints.side_files import TOKENIZER_FILES
from ..checkpoints.side_files import _template as chat_template
from ..checkpoints.strict_json import parse_json
from ..checkpoints.vocabulary import LARGEST_TOKENIZER, Vocabulary, read_vocabulary
from ..errors import InputError
from .finding import Finding, some
from .models import BASE, MERGED, Models

# Fields of config.json that change what a model computes from the same weights.
_BEHAVIOUR = (
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rms_norm_eps", "layer_norm_eps"),
    *("hidden_act", "hidden_activation", "activation_function", "sliding_window", "use_sliding_window"),
    *("attention_bias", "mlp_bias", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("num_experts_per_tok", "logit_scale", "final_logit_softcapping", "attn_logit_softcapping"),
)  # fmt: skip
_TEMPLATE_PLACES = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json")
_ROWS = [name for name in TOKENIZER_FILES if name not in _TEMPLATE_PLACES]


def examine_files(models: Models) -> list[Finding]:
    """All checks of this module, in the order above. Raises InputError E_READ, E_PATH for files that cannot be read."""
    people = {who: model for who, model in models.checkpoints.items() if who != MERGED}
    findings = [_architecture(people), _tensors(models), _types(people), _tied(people), *_vocabulary(people)]
    return [*findings, *_templates(people), *_adapters(models)]


def _settings(model: Checkpoint) -> dict[str, Any]:
    """config.json with its text part on top."""
    config = model.config or {}
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, Mapping) else dict(config)


def _architecture(people: Mapping[str, Checkpoint]) -> Finding:
    configs = {who: _settings(model) for who, model in people.items() if model.config is not None}
    missing = [who for who in people if who not in configs]
    if len(configs) < 2:
        return Finding(
            "architecture", "note", "Whether the models are of one architecture could not be read.",
            f"No config.json: {some(missing)}.", None, "Put each model's config.json beside its weights.", "files",
        )  # fmt: skip
    kinds = {who: str(c.get("model_type") or c.get("architectures")) for who, c in configs.items()}
    if len(set(kinds.values())) > 1:
        return Finding(
            "architecture", "problem", "The models are of different architectures.",
            "; ".join(f"{who}: {kind}" for who, kind in kinds.items()) + ".", float(len(set(kinds.values()))),
            "Weights can only be merged within one architecture: take out the models that differ.", "files",
        )  # fmt: skip
    first = next(iter(configs))
    differing = {
        key: [who for who, c in configs.items() if _value(c.get(key)) != _value(configs[first].get(key))]
        for key in _BEHAVIOUR
    }
    differing = {key: who for key, who in differing.items() if who}
    if differing:
        key, who = next(iter(differing.items()))
        shown = f"{key}: {first} {_short(configs[first].get(key))}, {who[0]} {_short(configs[who[0]].get(key))}"
        return Finding(
            "architecture", "warning",
            f"The configurations differ in {some(differing)}: the same weights would compute something else.",
            f"{shown}; differs in {some(sorted({w for ws in differing.values() for w in ws}))}.", float(len(differing)),
            f"A merged model gets config.json of {first}. If experts were trained with another value, correct that "
            "file in the output folder and compare both with `app.py evaluate`.", "files",
        )  # fmt: skip
    text = f"All {len(people)} are {next(iter(kinds.values()))} with equal settings."
    if missing:
        text = f"Those with a config.json are {next(iter(kinds.values()))}; {some(missing)}: no config.json."
    return Finding("architecture", "ok", "One architecture.", text, None, "", "files")


def _tensors(models: Models) -> Finding:
    compared, skipped = len(models.tensors), [s for s in models.skipped if "buffer" not in s[1]]
    evidence = f"{compared:,} tensors with {models.parameters:,} weights are in all models in the same shape"
    if not skipped:
        return Finding("tensors", "ok", "All tensors fit.", f"{evidence}.", 0.0, "")
    shapes = [name for name, why in skipped if why.startswith("shapes differ")]
    why = Counter("shapes differ" if w.startswith("shapes differ") else w for _, w in skipped)
    evidence += f"; not compared: {'; '.join(f'{n} {w}' for w, n in why.most_common(3))}; for example {skipped[0][0]}."
    if shapes:
        return Finding(
            "tensors", "problem", f"{len(shapes):,} tensors have different shapes.", evidence, float(len(shapes)),
            "Tensors of different shapes cannot be merged: the models have different sizes. Take out the model that "
            "differs. (`app.py plan` names each of them.)",
        )  # fmt: skip
    return Finding(
        "tensors", "warning", f"{len(skipped):,} tensors are not in all models.", evidence, float(len(skipped)),
        "A merge stops there until you choose: `policies: {missing_tensors: base}` where an expert lacks a tensor, "
        "`policies: {extra_tensors: drop}` (or `copy`) where it has one more.",
    )  # fmt: skip


def _types(people: Mapping[str, Checkpoint]) -> Finding:
    types = {who: _main_type(model) for who, model in people.items()}
    kinds = list(dict.fromkeys(types.values()))
    text = "; ".join(f"{kind}: {some([w for w, k in types.items() if k == kind])}" for kind in kinds)
    if len(kinds) == 1:
        return Finding("dtype", "ok", "One number type.", f"All weights are stored as {kinds[0]}.", None, "")
    return Finding(
        "dtype", "note", "The models are stored in different number types.", f"{text}.", float(len(kinds)),
        f"The rounding of 16-bit models is part of their change here. The merge is written as {types[BASE]}, like the "
        "base; choose otherwise with `dtype: float32` in the recipe.",
    )  # fmt: skip


def _main_type(model: Checkpoint) -> str:
    """The type of most weights (an adapter's own, as it is stored, is wider: the base's counts)."""
    model = model.base if model.base is not None else model
    sizes: Counter[str] = Counter()
    for source in model.tensors.values():
        if source.dtype in FLOATS:
            sizes[source.dtype] += source.numel
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
    return names[sizes.most_common(1)[0][0]] if sizes else "no floating-point type"


def _tied(people: Mapping[str, Checkpoint]) -> Finding:
    with_table = {who: m for who, m in people.items() if head_and_embedding(m.tensors)[1] is not None}
    tied = {who for who, m in with_table.items() if is_tied(m.config, m.tensors)}
    if not tied or tied == set(with_table):
        what = "share one table" if tied else "are separate tables"
        where = f"Embedding and output head {what} in all models." if with_table else "There is no token embedding."
        return Finding("tied_head", "ok", "Heads agree.", where, None, "")
    own = [who for who in with_table if who not in tied]
    return Finding(
        "tied_head", "note", "Some models tie the output head to the embedding, others do not.",
        f"Tied: {some(sorted(tied))}. A head of its own: {some(own)}.", float(len(tied)),
        "The merge gets a head of its own, and tied models lend their embedding for it. To keep the head out of the "
        "merge: `include: {head: false}`.",
    )  # fmt: skip


# -- vocabulary and template --------------------------------------------------------------------------------------


def _vocabulary(people: Mapping[str, Checkpoint]) -> list[Finding]:
    tables = {who: head_and_embedding(model.tensors)[1] for who, model in people.items()}
    rows = {who: people[who].tensors[name].shape[0] for who, name in tables.items() if name is not None}
    if BASE not in rows:
        return []
    files = {who: _tokenizer_bytes(_folder(people[who])) for who in rows}
    known = {who: content for who, content in files.items() if content}
    if not known:
        return [Finding("tokenizer", "note", "No model has tokenizer files.", "Token numbers cannot be compared.", None,
                        "Copy the tokenizer files of the base into its folder.", "files")]  # fmt: skip
    first = BASE if BASE in known else next(iter(known))
    base = read_vocabulary(_folder(people[first]))
    findings = [_padding(rows, base, first)]
    others = [who for who in known if known[who] != known[first]]
    differing = {}
    for who in others:
        theirs = read_vocabulary(_folder(people[who]))
        if base is not None and theirs is not None and not theirs.same(base):
            differing[who] = _difference(base, theirs)
    without = [who for who in rows if who not in known]
    if differing:
        renumbered = any("numbered otherwise" in text for text in differing.values())
        findings.append(Finding(
            "tokenizer", "warning", f"The vocabularies differ: {some(differing)}.",
            "; ".join(f"{who}: {text}" for who, text in list(differing.items())[:3]) + f" (against {first}).",
            float(len(differing)),
            "A merge matches rows by the token's text and keeps everybody's tokens; `tokenizer: {source: base}` keeps "
            "the base's only." + (" Numbers of embedding and head below compare rows by number." if renumbered else ""),
            "files"))  # fmt: skip
    else:
        text = f"{len(known)} of {len(rows)} models have tokenizer files, and they mean the same tokens."
        text += f" Without: {some(without)} (taken to be equal)." if without else ""
        findings.append(Finding("tokenizer", "ok", "One vocabulary.", text, None, "", "files"))
    return findings


def _padding(rows: Mapping[str, int], base: Vocabulary | None, first: str) -> Finding:
    counts = "; ".join(f"{count:,} rows: {some([w for w, r in rows.items() if r == count])}" for count in
                       dict.fromkeys(rows.values()))  # fmt: skip
    if len(set(rows.values())) > 1:
        return Finding(
            "vocabulary_rows", "warning", "The embeddings have different numbers of rows.", f"{counts}.",
            float(max(rows.values()) - min(rows.values())),
            "Rows that an expert lacks stay as in the base, rows that only it has are appended. To keep the base's "
            "table out of the merge: `include: {embeddings: false, head: false}`.",
        )  # fmt: skip
    highest = max(base.tokens.values(), default=-1) + 1 if base is not None and base.known else rows[first]
    padding = rows[first] - highest
    if padding > 0:
        return Finding(
            "vocabulary_rows", "ok", "The embedding is padded.",
            f"{rows[first]:,} rows, of which {padding:,} belong to no token.", float(padding),
            "Padding rows are kept; `tokenizer: {pad_to_multiple_of: 64}` pads otherwise.", "files",
        )  # fmt: skip
    return Finding("vocabulary_rows", "ok", "Embeddings are equally long.", f"{counts}.", 0.0, "")


def _difference(base: Vocabulary, other: Vocabulary) -> str:
    if not (base.known and other.known):
        return f"another {other.file}, in a form that is not read here"
    extra, lacking = other.tokens.keys() - base.tokens.keys(), base.tokens.keys() - other.tokens.keys()
    moved = sum(base.tokens[text] != number for text, number in other.tokens.items() if text in base.tokens)
    parts = (
        [f"{len(extra):,} more ({some(map(repr, sorted(extra, key=other.tokens.__getitem__)), 2)})"] if extra else []
    )
    parts += [f"{len(lacking):,} fewer"] if lacking else []
    parts += [f"{moved:,} numbered otherwise"] if moved else []
    return ", ".join(parts)


def _templates(people: Mapping[str, Checkpoint]) -> list[Finding]:
    found = {who: chat_template(_folder(model)) for who, model in people.items()}
    texts = {who: json.dumps(template.get("text")) for who, template in found.items() if template}
    if not texts:
        return []
    without = [who for who in people if who not in texts]
    groups: dict[str, list[str]] = {}
    for who, text in texts.items():
        groups.setdefault(text, []).append(who)
    if len(groups) == 1 and not without:
        return [Finding("chat_template", "ok", "One chat template.", "All models have the same.", None, "", "files")]
    text = " | ".join(some(who) for who in groups.values())
    text = f"{len(groups)} different: {text}" if len(groups) > 1 else f"Equal in {text}"
    text += f"; none: {some(without)}." if without else "."
    expert = next((who for who in texts if who != BASE), BASE)
    if len(groups) == 1 and BASE not in texts:
        return [Finding(
            "chat_template", "note", "Only experts have a chat template.", text, float(len(without)),
            "The merge gets the template that the experts agree on. Evaluate base and merge with the same one.",
            "files",
        )]  # fmt: skip
    return [Finding(
        "chat_template", "warning" if len(groups) > 1 else "note", "The chat templates differ.", text,
        float(len(groups)),
        f"The merge gets the base's if it has one; choose with `chat_template: {expert}` in the recipe. Scores of "
        "instruction following depend on it more than on the method: evaluate every model with the template that it "
        "was trained with.", "files",
    )]  # fmt: skip


def _adapters(models: Models) -> list[Finding]:
    """Was each adapter made for this base? Its configuration names the one that it was trained on."""
    findings = []
    mine = models.reference["base"]
    for who, model in models.checkpoints.items():
        if model.kind != "adapter":
            continue
        config = parse_json(read_whole(model.path / ADAPTER_CONFIG, LARGEST_CONFIG, "E_JSON"), ADAPTER_CONFIG)
        stated = str(config.get("base_model_name_or_path") or "")
        if stated and _last(stated) != _last(mine):
            findings.append(Finding(
                "adapter_base", "warning", f"The adapter {who} names another base.",
                f"adapter_config.json says {stated[:120]!r}; you gave {mine[:120]!r}.", None,
                f"If they are different models, use `base: {stated[:120]}`: an adapter on the wrong base is noise.",
                "files",
            ))  # fmt: skip
    return findings


def _folder(model: Checkpoint) -> Path:
    """Where a model's side files are: an adapter without a tokenizer uses its base's."""
    if model.base is not None and not _tokenizer_bytes(model.path):
        return model.base.path
    return model.path


def _tokenizer_bytes(folder: Path) -> dict[str, bytes]:
    """Tokenizer files with their bytes, without the chat template's places (which are compared by themselves)."""
    found = {n: folder / n for n in (*_ROWS, "tokenizer_config.json") if os.path.lexists(folder / n)}
    content = {name: read_whole(path, LARGEST_TOKENIZER, "E_JSON") for name, path in found.items()}
    if "tokenizer_config.json" in content:
        try:
            settings = parse_json(content["tokenizer_config.json"], str(folder / "tokenizer_config.json"))
            if isinstance(settings, dict):
                settings.pop("chat_template", None)
                content["tokenizer_config.json"] = json.dumps(settings, sort_keys=True).encode()
        except InputError:  # reading the vocabulary will say it
            pass
    return content if set(content) - {"tokenizer_config.json"} else {}


def _last(reference: str) -> str:
    return reference.split("@")[0].rstrip("/").split("/")[-1].lower()


def _value(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _short(value: Any) -> str:
    text = "not stated" if value is None else _value(value)
    return text if len(text) <= 40 else text[:37] + "..."
