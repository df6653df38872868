"""Calibration texts as token numbers, with an account of what was used, cut and left out.

Texts are used as they stand: no chat template is put around them, only the special tokens that the tokenizer adds by
itself. A measurement takes one text at a time and so needs no padding; ``batches`` pads for those that take many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merging.calibration.texts import Chosen, Text, problem
from merging.errors import InputError

if TYPE_CHECKING:
    import torch

LENGTH = 512
"""Tokens of a text that are used unless more are asked for."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One text as token numbers. ``cut``: tokens beyond the limit, which are not used."""

    text: Text
    tokens: tuple[int, ...]
    cut: int = 0

    @property
    def where(self) -> str:
        return self.text.where

    def inputs(self) -> dict[str, torch.Tensor]:
        """What a model takes for this text alone: int64 tensors of shape (1, tokens), nothing padded."""
        import torch

        tokens = torch.tensor([self.tokens])
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@dataclass(frozen=True, slots=True)
class Samples:
    """The tokenised sample and its account."""

    samples: tuple[Sample, ...]
    chosen: Chosen
    vocabulary: int
    """Token numbers that the model knows."""
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    @property
    def tokens(self) -> int:
        return sum(len(sample.tokens) for sample in self.samples)

    def as_dict(self) -> dict[str, Any]:
        """The account as JSON values: how many samples and tokens, which share of the vocabulary occurs, from where,
        and the hash of each text used."""
        used = [sample.text.source for sample in self.samples]
        return {
            "samples": len(self.samples),
            "tokens": self.tokens,
            "longest": max(len(sample.tokens) for sample in self.samples),
            "vocabulary_share": len({t for s in self.samples for t in s.tokens}) / self.vocabulary,
            "seed": self.chosen.seed,
            "key": self.chosen.key,
            "sources": [
                {"file": name, "texts": count, "used": used.count(name)}
                for name, count in self.chosen.available.items()
            ],
            "hashes": [sample.text.hash for sample in self.samples],
            "notes": [*self.chosen.notes, *self.notes],
        }


def tokenize(chosen: Chosen, tokenizer: Any, vocabulary: int, length: int = LENGTH, least: int = 1) -> Samples:
    """The chosen texts as token numbers, with the special tokens that the tokenizer adds by itself.

    Args:
        tokenizer: of transformers.
        vocabulary: rows of the model's token embedding.
        length: tokens of a text that are used at most; what is beyond is cut off, and said in the notes.
        least: texts with fewer tokens are left out, and said in the notes (2 where a next token is to be predicted).

    Raises:
        InputError: ``E_TEXT`` if no text has enough tokens; ``E_VOCABULARY``, naming file and line, if the tokenizer
            gives a number that the model has no embedding for.
    """
    if length < least:
        raise InputError("E_TEXT", f"Texts of {length} tokens are too short.", "", f"Allow at least {least}.")
    samples: list[Sample] = []
    short, unknown, total = 0, 0, 0
    unknown_number = getattr(tokenizer, "unk_token_id", None)
    for text in chosen.texts:
        try:
            tokens = whole = tokenizer(text.text, verbose=False)["input_ids"]
            if len(whole) > length:  # by the tokenizer, which keeps its special tokens at the ends
                tokens = tokenizer(text.text, truncation=True, max_length=length, verbose=False)["input_ids"]
        except Exception as error:  # whatever a foreign tokenizer does
            first = str(error).strip().split("\n")[0][:300]
            why = f"the tokenizer fails ({type(error).__name__}: {first})"
            raise problem(text.source, text.line, why, "Leave this text out.") from None
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
            raise InputError(
                "E_VOCABULARY",
                f"{text.where}: the tokenizer gives token {max(tokens)}, the model knows {vocabulary}.",
                "The tokenizer does not belong to this model.",
                "Put the model's own tokenizer into its folder.",
            )
        if len(tokens) < least:
            short += 1
            continue
        total += len(whole)
        unknown += tokens.count(unknown_number) if unknown_number is not None else 0
        samples.append(Sample(text, tuple(tokens), len(whole) - len(tokens)))
    if not samples:
        what = f"None of the {len(chosen.texts)} calibration texts has {least} tokens."
        raise InputError("E_TEXT", what, "", "Give longer texts.")
    notes = []
    if cut := [sample for sample in samples if sample.cut]:
        lost = sum(sample.cut for sample in cut)
        notes.append(f"{len(cut)} texts were cut to {length} tokens ({lost:,} of {total:,} tokens are not used).")
    if short:
        notes.append(f"{short} texts have fewer than {least} tokens and were left out.")
    if unknown:
        notes.append(f"{unknown:,} of {total:,} tokens are unknown to the tokenizer.")
    return Samples(tuple(samples), chosen, vocabulary, tuple(notes))


def batches(
    samples: Sequence[Sample], size: int, padding: int
) -> Iterator[tuple[list[int], Mapping[str, torch.Tensor]]]:
    """Batches of up to ``size`` texts of similar length, padded on the right with the token ``padding``.

    Yields (which samples, {"input_ids", "attention_mask"}), both int64 of shape (texts, longest text of the batch); the
    mask is 1 on tokens and 0 on padding. Texts of similar length go together, the shortest first, so that little is
    padded; equal lengths keep their order.
    """
    import torch

    order = sorted(range(len(samples)), key=lambda number: len(samples[number].tokens))
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        width = len(samples[numbers[-1]].tokens)
        tokens = torch.full((len(numbers), width), padding)
        mask = torch.zeros_like(tokens)
        for row, number in enumerate(numbers):
            own = samples[number].tokens
            tokens[row, : len(own)] = torch.tensor(own)
            mask[row, : len(own)] = 1
        yield numbers, {"input_ids": tokens, "attention_mask": mask}
