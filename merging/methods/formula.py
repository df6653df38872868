"""Formulas as people write them, with the numbers that hold for one tensor.

Names in them: W is the result, W₀ the base, W_sort the expert ``sort`` and τ_sort = W_sort − W₀ what it changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Value = tuple[str, str, float]
"""(symbol, what it is, its number)."""

CHANGES = "τ_k = W_k − W₀: what expert k changed"


@dataclass(frozen=True, slots=True)
class Formula:
    """``text``: one line. ``where``: what its symbols stand for, a line each. ``values``: the numbers in it."""

    text: str
    where: tuple[str, ...] = ()
    values: tuple[Value, ...] = ()


def number(value: float) -> str:
    """Four digits, and a minus sign that is one."""
    return f"{value:.4g}".replace("-", "−")


def sum_of(terms: Iterable[tuple[float, str]]) -> str:
    """``0.4·a − b`` from [(0.4, "a"), (−1, "b"), (0, "c")]; ``0`` if nothing is left."""
    text = ""
    for factor, symbol in terms:
        if factor:
            sign = ("− " if factor < 0 else "+ ") if text else ("−" if factor < 0 else "")
            text += f"{' ' if text else ''}{sign}{times(abs(factor), symbol)}"
    return text or "0"


def percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def times(factor: float, symbol: str) -> str:
    return symbol if factor == 1 else f"{number(factor)}·{symbol}"


def on_base(change: str) -> str:
    """W₀ + change, for a change that may begin with a minus or be 0."""
    if change == "0":
        return "W₀"
    return f"W₀ − {change[1:]}" if change.startswith("−") else f"W₀ + {change}"


def scaled(factor: float, sum_: str) -> str:
    """``factor`` times a sum (which is one expression already)."""
    if factor == 0:
        return "0"
    return sum_ if factor == 1 else f"{number(factor)}·{sum_}"


def per_expert(symbol: str, meaning: str, names: Sequence[str], numbers: Sequence[float]) -> tuple[Value, ...]:
    """One value for each expert: ``per_expert("w", "weight", …)`` gives (w_sort, weight of sort, 0.4) …"""
    return tuple(
        (f"{symbol}_{name}", f"{meaning} of {name}", float(value)) for name, value in zip(names, numbers, strict=True)
    )
