"""What must hold for every method: invariants E1–E15 over the table of cases.

Hypothesis draws a seed and the knobs (size, shape, dtype, number of experts, what the values look like); numpy makes
the tensors, so that one example costs a millisecond and a failure still shrinks to the smallest knobs. ``X`` in a name
means bit-exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from merging.errors import AmalgamError
from merging.methods import Workspace, make, selection
from merging.methods.scan import merge_tensors
from tests.methods.cases import BY_ID, CASES, Case

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
EXAMPLES = settings(max_examples=14, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@dataclass(frozen=True)
class Knobs:
    seed: int
    shape: tuple[int, ...]
    dtype: str
    experts: int
    kind: str

    def models(self, count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """A base and ``count`` experts near it."""
        rng = np.random.default_rng(self.seed)
        base = rng.normal(0, 0.05, self.shape)
        deltas = [rng.normal(0, 0.01, self.shape) for _ in range(count)]
        if self.kind == "grid":  # few different values: many ties, many zeros
            base = np.round(base * 64) / 64
            deltas = [np.round(d * 256) / 256 for d in deltas]
        if self.kind == "sparse":
            deltas = [d * (rng.random(self.shape) < 0.2) for d in deltas]
        if self.kind == "signed zeros" and base.size:
            base = np.where(rng.random(self.shape) < 0.5, -0.0, base)
            deltas = [np.where(rng.random(self.shape) < 0.5, 0.0, d) for d in deltas]
        if self.kind == "tiny":  # subnormal in float16
            base, deltas = base * 1e-6, [d * 1e-6 for d in deltas]
        dtype = DTYPES[self.dtype]
        first = torch.from_numpy(np.asarray(base)).to(dtype)
        experts = [
            torch.where(
                torch.from_numpy(np.asarray(d)) == 0,
                first,
                (first.double() + torch.from_numpy(np.asarray(d))).to(dtype),
            )
            for d in deltas
        ]
        return first, experts


knobs = st.builds(
    Knobs,
    st.integers(0, 2**32),
    st.sampled_from([(), (0,), (1,), (7,), (40,), (5, 8), (3, 4, 5), (130,)]),
    st.sampled_from(list(DTYPES)),
    st.integers(1, 4),
    st.sampled_from(["normal", "grid", "sparse", "signed zeros", "tiny"]),
)
all_cases = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)


def count_for(case: Case, wish: int) -> int:
    return max(case.experts[0], min(case.experts[1], wish))


def merge(
    case: Case, own: list[dict], base: torch.Tensor, experts: list[torch.Tensor], **options: object
) -> torch.Tensor:
    method = case.build(own)
    return merge_tensors(method, {"w": base} if case.base else None, [{"w": e} for e in experts], **options)["w"]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.dtype.itemsize]
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
    )


def ulp(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance to the next number of ``dtype`` at the size of ``x``."""
    info = torch.finfo(dtype)
    return torch.clamp(
        torch.exp2(torch.floor(torch.log2(x.abs().double().clamp(min=1e-300)))) * info.eps,
        min=info.smallest_normal * info.eps,
    )


def close(a: torch.Tensor, b: torch.Tensor, *scale: torch.Tensor, ulps: float = 1.01) -> bool:
    """Within ``ulps`` steps of the dtype, at the size of the largest number that took part (class A)."""
    size = torch.stack([x.abs().double() for x in (a, b, *scale)]).amax(0)
    return bool(((a.double() - b.double()).abs() <= ulps * ulp(size, a.dtype)).all())


@all_cases
@given(k=knobs)
@EXAMPLES
def test_e1_all_experts_off_is_the_base_x(case: Case, k: Knobs) -> None:
    if case.off is None or not case.base:
        return
    base, experts = k.models(count_for(case, k.experts))
    if base.numel() > 1:  # any bits: NaN with a payload, −0.0, infinity
        base.view(-1)[0], base.view(-1)[1] = -0.0, float("nan")
    own = [draw | case.off for draw in case.draw(np.random.default_rng(k.seed), len(experts))]
    if case.method == "nuslerp":
        return  # two weights of zero mean "half way" there
    assert same_bits(merge(case, own, base, experts), base)


@all_cases
@given(k=knobs)
@EXAMPLES
def test_e2_a_lone_expert_is_itself_x(case: Case, k: Knobs) -> None:
    if case.alone is None:
        return
    base, experts = k.models(count_for(case, k.experts))
    own = [dict(case.off or {}) for _ in experts]
    for parameters, drawn in zip(own, case.draw(np.random.default_rng(k.seed), len(experts)), strict=True):
        parameters.update({name: value for name, value in drawn.items() if name not in parameters})
    own[-1] = {**own[-1], **case.alone} if case.alone else {}
    assert same_bits(merge(case, own, base, experts), experts[-1])


@all_cases
@given(k=knobs)
@EXAMPLES
def test_e3_unchanged_experts_give_the_base_x(case: Case, k: Knobs) -> None:
    base, experts = k.models(count_for(case, k.experts))
    own = case.draw(np.random.default_rng(k.seed), len(experts))
    merged = merge(case, own, base, [base.clone() for _ in experts])
    if case.base and case.method != "slerp":
        assert same_bits(merged, base)
    elif case.id in ("linear", "slerp", "nuslerp-free"):
        assert close(merged, base) and (k.dtype == "f64" or torch.equal(merged, base))


@all_cases
@given(k=knobs)
@EXAMPLES
def test_e4_copies_of_one_expert_give_that_expert(case: Case, k: Knobs) -> None:
    if not case.mean or (case.method == "nuslerp" and k.kind == "tiny"):  # norms below 1e-7 count as 1e-7 there
        return
    base, (expert,) = k.models(1)
    count = count_for(case, max(2, k.experts))
    own = [
        dict(drawn, weight=1 / count) | ({"density": 1.0} if "density" in drawn else {})
        for drawn in case.draw(np.random.default_rng(k.seed), count)
    ]
    merged = merge(case, own, base, [expert.clone() for _ in range(count)])
    assert close(
        merged, expert, base, ulps=4.01 if case.exact_sums and k.dtype == "f64" else 2.01 if k.dtype == "f64" else 1.01
    )
    if k.dtype in ("bf16", "f16", "f32") and not case.exact_sums:
        assert torch.equal(merged, expert)


@all_cases
@given(k=knobs)
@EXAMPLES
def test_e5_the_order_of_experts_does_not_matter(case: Case, k: Knobs) -> None:
    method = BY_ID[case.id].build(case.draw(np.random.default_rng(0), case.experts[0]))
    if not type(method).symmetric or type(method).random:
        return
    base, experts = k.models(count_for(case, k.experts))
    own = case.draw(np.random.default_rng(k.seed), len(experts))
    there = merge(case, own, base, experts)
    back = merge(case, own[::-1], base, experts[::-1])
    # entries whose votes cancel to within rounding may fall either way: leave a few of them out
    different = (there.double() - back.double()).abs() > 8 * ulp(torch.maximum(there.abs(), base.abs()), there.dtype)
    assert int(different.sum()) <= there.numel() // 20


@all_cases
@given(k=knobs)
@EXAMPLES
def test_e6_block_size_does_not_matter_x(case: Case, k: Knobs) -> None:
    base, experts = k.models(count_for(case, k.experts))
    own = case.draw(np.random.default_rng(k.seed), len(experts))
    whole = merge(case, own, base, experts)
    with small_blocks(16):
        pieces = merge(case, own, base, experts)
    if case.exact_sums or case.id == "pcb-paper":  # sums over blocks: the block size is part of the numerics (N5)
        assert close(whole, pieces, base, *experts, ulps=4.01)
    else:
        assert same_bits(whole, pieces)


class small_blocks:
    """Workspaces with another block size, for a while."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> None:
        self.before = Workspace.__init__

        def shrunk(workspace: Workspace, device: str = "cpu", *, init=self.before, size: int = self.size) -> None:
            init(workspace, device)
            workspace.block_size = size

        Workspace.__init__ = shrunk  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        Workspace.__init__ = self.before  # type: ignore[method-assign]


@all_cases
@given(k=knobs, power=st.integers(-3, 3))
@EXAMPLES
def test_e8_scaling_the_task_vectors_scales_the_merge_x(case: Case, k: Knobs, power: int) -> None:
    if not case.scales or k.dtype == "f16" or k.kind == "tiny":
        return
    base, experts = k.models(count_for(case, k.experts))
    deltas = [(e.double() - base.double()).to(e.dtype) for e in experts]
    zero, factor = torch.zeros_like(base), 2.0**power
    own = case.draw(np.random.default_rng(k.seed), len(experts))
    once = merge(case, own, zero, deltas)
    scaled = merge(case, own, zero, [d * factor for d in deltas])
    if case.exact_sums:
        assert close(scaled, once * factor, ulps=8.01)
    else:
        assert torch.equal(scaled, once * factor)


@all_cases
@given(k=knobs)
@EXAMPLES
def test_e9_moving_base_and_experts_moves_the_merge(case: Case, k: Knobs) -> None:
    if (
        k.dtype not in ("f32", "f64")
        or case.method in ("slerp", "passthrough")
        or case.id in ("nuslerp-free", "linear-sum")
    ):
        return
    grid = Knobs(k.seed, k.shape, k.dtype, k.experts, "grid")
    base, experts = grid.models(count_for(case, k.experts))
    shift = torch.full_like(base, 3.0)
    own = case.draw(np.random.default_rng(k.seed), len(experts))
    here = merge(case, own, base, experts)
    there = merge(case, own, base + shift, [e + shift for e in experts])
    assert close(there, here + shift, shift * 2, ulps=4.01)


@all_cases
@given(k=knobs)
@EXAMPLES
def test_e10_negated_task_vectors_give_the_negated_merge(case: Case, k: Knobs) -> None:
    base, experts = k.models(count_for(case, k.experts))
    if case.method == "slerp":
        return
    deltas = [(e.double() - base.double()).to(e.dtype) for e in experts]
    zero = torch.zeros_like(base)
    own = case.draw(np.random.default_rng(k.seed), len(experts))
    plus, minus = merge(case, own, zero, deltas), merge(case, own, zero, [-d for d in deltas])
    different = plus.double() != -minus.double()
    # where the votes add up to zero, + is elected both times: only there may the two differ
    assert int(different.sum()) <= (
        0 if k.kind == "normal" and case.method not in ("ties", "dare_ties") else plus.numel()
    )
    if case.method in ("ties", "dare_ties") and k.kind == "normal" and len(experts) == 1:
        assert not bool(different.any())


@all_cases
@given(k=knobs)
@EXAMPLES
def test_e11_and_e12_tensors_do_not_touch_each_other_nor_the_inputs_x(case: Case, k: Knobs) -> None:
    base, experts = k.models(count_for(case, k.experts))
    other, others = Knobs(k.seed + 1, (33,), k.dtype, k.experts, "normal").models(len(experts))
    kept = [t.clone() for t in (base, *experts)]
    own = case.draw(np.random.default_rng(k.seed), len(experts))
    method = case.build(own)
    if method.whole_model() is None:
        both = merge_tensors(
            method,
            {"w": base, "z": other} if case.base else None,
            [{"w": e, "z": o} for e, o in zip(experts, others, strict=True)],
        )
        assert same_bits(both["w"], merge(case, own, base, experts))
    assert all(same_bits(a, b) for a, b in zip(kept, (base, *experts), strict=True))


@all_cases
@given(k=knobs)
@EXAMPLES
def test_e14_shape_dtype_and_finiteness(case: Case, k: Knobs) -> None:
    base, experts = k.models(count_for(case, k.experts))
    merged = merge(case, case.draw(np.random.default_rng(k.seed), len(experts)), base, experts)
    assert merged.shape == base.shape and merged.dtype == base.dtype
    assert bool(torch.isfinite(merged.double()).all())


@all_cases
@given(k=knobs)
@EXAMPLES
def test_e15_equals_the_float64_oracle(case: Case, k: Knobs) -> None:
    equals_the_oracle(case, k, case.draw(np.random.default_rng(k.seed), count_for(case, k.experts)))


SHARES = [
    (case, share)
    for case in CASES
    for share in (None, 0.0, 0.3, 1.0)
    if share is None or "density" in case.draw(np.random.default_rng(0), 1)[0]
]


@pytest.mark.parametrize(("case", "share"), SHARES, ids=lambda one: getattr(one, "id", str(one)))
def test_e15_where_order_statistics_begin_with_a_sample(
    case: Case, share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they do for large tensors; also when nothing or everything is kept. None: as drawn."""
    monkeypatch.setattr(selection, "BLOCK", 64)
    monkeypatch.setattr(selection, "SMALL_SAMPLE", 32)
    k = Knobs(11, (40, 50), "f32", 3, "normal")
    own = case.draw(np.random.default_rng(3), count_for(case, k.experts))
    if share is not None:
        own = [one | {"density": share} for one in own]
    equals_the_oracle(case, k, own)


def equals_the_oracle(case: Case, k: Knobs, own: list[dict[str, Any]]) -> None:
    base, experts = k.models(len(own))
    merged = merge(case, own, base, experts)
    if case.oracle is None or not np.prod(k.shape):
        return
    wide = [t.double().numpy() for t in (base, *experts)]
    try:
        expected = np.asarray(case.oracle(wide[0] if case.base else None, wide[1:], case.shared, own))
    except ValueError:  # opposite directions, weights that cancel out: no such result
        return
    if not np.isfinite(expected).all():
        return
    right = torch.from_numpy(expected).to(base.dtype)
    size = torch.stack([right.abs().double(), merged.abs().double()]).amax(0)
    if k.dtype == "f64":  # no wider type to compute in: last bits of the inputs' size may differ
        size, steps = torch.stack([size, *(t.abs() for t in (base, *experts))]).amax(0), 32.0
    else:
        steps = 1.01
    off = (merged.double() - right.double()).abs() > steps * ulp(size, base.dtype)
    # Arithmetic in float32 can meet a vote or a threshold that float64 decides the other way; class A allows
    # one entry in a thousand, and a small tensor one entry.
    assert int(off.sum()) <= max(1, merged.numel() // 1000) * (k.dtype in ("bf16", "f16")), (merged, right)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_e13_every_parameter_matters_and_unknown_ones_are_refused(case: Case) -> None:
    base, experts = Knobs(3, (20, 30), "f32", 3, "normal").models(count_for(case, 3))
    own = case.draw(np.random.default_rng(5), len(experts))
    before = merge(case, own, base, experts)
    method = case.build(own)
    for scope, model in (("shared", type(method).Shared), ("own", type(method).PerExpert)):
        for key, info in model.model_fields.items():
            name = info.alias or key
            if (case.method, name) in NO_EFFECT or (case.id, name) in NO_EFFECT:
                continue
            for value in OTHER[name]:
                changed = [dict(own[0], **{name: value}), *own[1:]] if scope == "own" else own
                try:
                    built = case.build(changed, **({name: value} if scope == "shared" else {}))
                except ValueError:
                    continue
                after = merge_tensors(built, {"w": base} if case.base else None, [{"w": e} for e in experts])["w"]
                if not torch.equal(before, after):
                    break
            else:
                pytest.fail(f"{case.id}: {name} changes nothing")
        with pytest.raises(ValueError, match="denisty"):
            model(**{"denisty": 0.5})


OTHER = {
    "weight": [0.123, 0.9],
    "density": [0.35, 0.07],
    "scale": [1.5],
    "lambda": [0.4],
    "normalize": [True, False],
    "scope": ["global", "tensor"],
    "rescale": ["none", "inverse"],
    "t": [0.6],
    "normalize_weights": [False],
    "eps": [0.5],
    "ratio": [0.11],
    "clip": [0.2],
    "variant": ["B", "C"],
}
# One tensor cannot tell global from per tensor; clipping plays no part in the formula as printed.
NO_EFFECT = {("ties", "scope"), ("pcb", "scope"), ("pcb-paper", "clip")}


def test_the_golden_values() -> None:
    """methods.md §8: TIES, PCB in three variants, SLERP; computed independently in float64."""
    base = torch.tensor([1, -1, 0.5, -0.5, 2, -2, 0, 0.25], dtype=torch.float64)
    first = base + torch.tensor([0.4, -0.1, 0.3, -0.2, 0.05, 0.6, -0.5, 0.02], dtype=torch.float64)
    second = base + torch.tensor([0.2, 0.3, -0.4, -0.1, 0.5, -0.05, -0.6, 0.01], dtype=torch.float64)

    def delta(name: str, shared: dict, own: list[dict]) -> list[float]:
        merged = merge_tensors(make(name, shared, own), {"w": base}, [{"w": first}, {"w": second}])["w"]
        return (merged - base).tolist()

    def golden(values: list[float]) -> object:
        return pytest.approx(values, abs=1.5e-6)

    assert delta("ties", {}, [{"density": 0.5}] * 2) == golden([0.4, 0.3, -0.4, 0, 0.5, 0.6, -0.55, 0])
    for variant, values in {
        "C": [0.39217, 0, 0, 0, 0.5, 0.6, -0.550588, 0],
        "A": [0.38934, 0, 0, 0, 0.5, 0.6, -0.554599, 0],
        "B": [0.389616, 0, 0, 0, 0.5, 0.6, -0.557105, 0],
    }.items():
        assert delta("pcb", {"ratio": 0.5, "clip": 0, "variant": variant}, [{}, {}]) == golden(values)
    walked = merge_tensors(make("slerp", {"t": 0.3}, [{}]), {"w": first}, [{"w": second}])["w"]
    assert walked.tolist() == golden(
        [1.354323, -0.990105, 0.595413, -0.677162, 2.209488, -1.613345, -0.535927, 0.269897]
    )


def test_opposite_weights_in_linear_are_refused() -> None:
    with pytest.raises(AmalgamError) as caught:
        make("linear", {}, [{"weight": 1.0}, {"weight": -1.0}]).coefficients()
    assert caught.value.code == "E_RECIPE_FIELD"
