"""Every kernel on a device that is not there.

Mixed-device code (a scratch tensor left in host memory, a mask that is not moved, ``.numpy()`` of device memory)
runs without complaint where there is no accelerator, and fails on the first machine that has one. Two stand-ins
find it without:

* ``combine`` runs under torch's FakeTensorMode with device "cuda": shapes, types and devices of every operation
  are checked as CUDA would, but there are no numbers. So what depends on numbers cannot run there: ``prepare``,
  and in trimming the count of entries that sit exactly on the threshold.
* everything, ``prepare`` included, runs with real numbers in tensors that only pretend to be elsewhere: they
  refuse to meet a host tensor in one operation, or to be looked at by numpy, but for the transfers that move
  data on purpose.

What remains unproven without a real accelerator: that each operation exists there for these types, and last bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from merging import engine
from merging.methods import BLOCK, METHODS, Block, Method, Workspace
from merging.methods.base import DEVICE_BLOCK
from merging.methods.scan import BlockScan, TensorInputs, memory_reader, round_into
from merging.methods.trimming import Threshold
from tests.methods.cases import CASES, Case
from tests.small_checkpoints import family, load, merge, recipe, same_bits

SIZE = 1000
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
each_type = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def method_and_models(case: Case, dtype: Any, size: int = SIZE) -> tuple[Method, Tensor | None, list[Tensor]]:
    rng = np.random.default_rng(3)
    count = min(3, case.experts[1])
    tensors = [torch.from_numpy(rng.choice(np.linspace(-1, 1, 41), size)).to(dtype) for _ in range(count + 1)]
    own = [{**e, **({"density": 0.3} if "density" in e else {})} for e in case.draw(rng, count)]
    method = case.build(own)
    return method, tensors[0] if case.base and method.uses_base else None, tensors[1:]


def inputs_of(base: Tensor | None, experts: list[Tensor]) -> TensorInputs:
    return TensorInputs("w", experts[0].numel(), experts[0].dtype,
                        None if base is None else memory_reader(base), [memory_reader(e) for e in experts])  # fmt: skip


def test_every_method_is_here() -> None:
    assert {case.method for case in CASES} == set(METHODS)


# -- without numbers: as CUDA sees it -----------------------------------------------------------------


class WithoutCuda(TorchFunctionMode):
    """Where torch was built without CUDA, the Python face of a few operations asks for its driver before anybody
    can say that the tensor is a fake. The operations themselves do not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, kwargs = torch.ops.aten, kwargs or {}
        if func is Tensor.copy_:
            return aten.copy_.default(*args)
        if func is Tensor.__getitem__ and isinstance(args[1], slice):
            return aten.slice.Tensor(args[0], 0, args[1].start or 0, args[1].stop)
        if func is Tensor.__setitem__ and isinstance(args[1], int):
            return aten.fill_.Scalar(aten.select.int(args[0], 0, args[1]), args[2])
        if func is Tensor.to and isinstance(args[1], torch.device):
            return aten._to_copy.default(args[0], device=args[1])
        return func(*args, **kwargs)


def without_ties(prepared: Any) -> Any:
    """The same thresholds, but no entry exactly on them that would have to be counted."""
    if isinstance(prepared, list) and prepared and isinstance(prepared[0], Threshold):
        return [dataclasses.replace(threshold, quota=0) for threshold in prepared]
    return prepared


@each_case
@each_type
def test_combine_stays_on_the_device(case: Case, dtype: Any) -> None:
    method, base, experts = method_and_models(case, dtype)
    (prepared,) = method.prepare(BlockScan([inputs_of(base, experts)], Workspace()))
    with FakeTensorMode(allow_non_fake_inputs=True), WithoutCuda():
        workspace = Workspace("cuda")
        assert workspace.block_size == DEVICE_BLOCK
        moved = [
            None if t is None else workspace.buffer(f"input{k}", SIZE, dtype) for k, t in enumerate([base, *experts])
        ]
        block = Block("w", 0, moved[0], [m for m in moved[1:] if m is not None], workspace, seed=1)
        result = method.combine(block, without_ties(prepared))
        assert isinstance(result, FakeTensor) and result.device.type == "cuda"
        assert (result.dtype, result.shape) == (dtype, (SIZE,))
        for stored in (torch.bfloat16, torch.float32):
            out = workspace.buffer("output", SIZE, stored)
            round_into(out, result)
            assert out.cpu().device.type == "cpu"


def test_fake_tensors_notice_a_tensor_left_behind() -> None:
    """The test above would fail."""
    with FakeTensorMode(allow_non_fake_inputs=True), WithoutCuda():
        there = Workspace("cuda").buffer("there", 4, torch.float32)
        for mistake in (
            lambda: there.add_(torch.zeros(4)),
            lambda: torch.mul(torch.zeros(4), 2, out=there),
            lambda: torch.lt(torch.from_numpy(np.zeros(4)), 2, out=there),
            lambda: there.numpy(),
        ):
            with pytest.raises(RuntimeError, match="device|numpy"):
                mistake()


# -- with numbers: elsewhere, as far as the kernels can tell ------------------------------------------


class Elsewhere(Tensor):
    """A tensor that will not be mixed with one in host memory, nor be read by numpy."""

    device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("numpy", "__array__", "tolist"):
            raise AssertionError(f"{name} of device memory")
        if name == "cpu":
            return args[0].as_subclass(Tensor).clone()
        if name != "copy_":  # the transfer to the device
            for tensor in tensors_in((args, kwargs)):
                if not isinstance(tensor, Elsewhere) and tensor.dim() > 0:
                    raise AssertionError(f"{name}: a tensor in host memory meets one on the device")
        return super().__torch_function__(func, types, args, kwargs)


def tensors_in(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))


class Transfer(TorchFunctionMode):
    """``host.to(device)`` moves a tensor there, and ``torch.zeros(..., device=device)`` makes one there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, there = dict(kwargs or {}), torch.device("cuda")
        if func is Tensor.to and args[1:] == (there,):
            return args[0].clone().as_subclass(Elsewhere)
        if kwargs.get("device") == there:
            return func(*args, **kwargs | {"device": "cpu"}).as_subclass(Elsewhere)
        return func(*args, **kwargs)


class Device(Workspace):
    """Its buffers are elsewhere."""

    def buffer(self, name: str, size: int, dtype: Any) -> Tensor:
        return super().buffer(name, size, dtype).as_subclass(Elsewhere)


@each_case
@pytest.mark.parametrize(
    ("size", "dtype"), [(SIZE, torch.float32), (SIZE, torch.float64), (5 * BLOCK + 7, torch.float32)], ids=str
)
def test_prepare_and_combine_mix_nothing(case: Case, dtype: Any, size: int) -> None:
    """And give the numbers that they give in host memory. The second size is one that is sampled first."""
    method, base, experts = method_and_models(case, dtype, size)
    results = []
    for workspace in (Workspace(), Device()):
        inputs, merged = inputs_of(base, experts), []
        with Transfer():
            (prepared,) = method.prepare(BlockScan([inputs], workspace, seed=1))
            for block in inputs.blocks(workspace, 1):
                result = method.combine(block, prepared)
                assert isinstance(result, Elsewhere) is isinstance(workspace, Device)
                merged.append(result.as_subclass(Tensor).clone())
        results.append(torch.cat(merged))
    assert torch.equal(*results)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "slerp", "pcb"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_engine_mixes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, dtype: Any) -> None:
    """Reading to the device, rounding there, and back to the disk, with all that is measured on the way."""
    paths = family(tmp_path, {"w": torch.randn(300, 300).to(dtype), "one": torch.ones(1).to(dtype)}, 2)
    own = {"slerp": {}, "linear": {"weight": 0.5}, "pcb": {}}.get(method, {"weight": 0.5, "density": 0.3})
    experts = [(path, own) for path in paths[1 : 2 if method == "slerp" else 3]]
    shared = {"t": 0.3} if method == "slerp" else {}
    what = recipe(method, experts, paths[0], parameters=shared, dtype="bfloat16")
    here = merge(what, tmp_path / "here")
    monkeypatch.setattr(engine, "Workspace", lambda device: Device())
    with Transfer():
        there = merge(what, tmp_path / "there")
    assert same_bits(load(tmp_path / "here"), load(tmp_path / "there"))
    assert here.manifest["delta_survival"] == there.manifest["delta_survival"]


def test_a_device_that_notices() -> None:
    workspace = Device()
    there = workspace.buffer("a", 4, torch.float32).fill_(1)
    with pytest.raises(AssertionError, match="host memory"):
        there.add_(torch.ones(4))
    with pytest.raises(AssertionError, match="host memory"):
        torch.add(torch.ones(4), 1, out=there)
    with pytest.raises(AssertionError, match="host memory"):
        torch.mul(there, 2, out=torch.empty(4))
    with pytest.raises(AssertionError, match="numpy"):
        there.numpy()
    assert isinstance(there + there, Elsewhere) and there.copy_(torch.ones(4)).sum().item() == 4
    assert type(there.cpu()) is Tensor
