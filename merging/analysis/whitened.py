"""Whitened spectra: what a task vector does to the inputs that its layer really gets.

The singular values of τ weigh all directions of a layer's input alike. Inputs do not: a few directions carry most of
them. With the mean outer product of the inputs on some texts, C = (1/n) Σ x xᵀ = L Lᵀ over n tokens,

    E‖τx‖² = tr(τ C τᵀ) = ‖τL‖²_F,

so the singular values of τL are those of the *change of the layer's output*, direction by direction. That is the
measure of D-Rank (arXiv 2509.25622, eq. 1-2) and the whitening of SVD-LLM, here for a task vector: which directions of
what the expert learned are excited at all. The measure ``relative`` is its total against the base's output,
‖τL‖_F / ‖W₀L‖_F = sqrt(E‖τx‖² / E‖W₀x‖²): by how much the expert changes what the layer says.

The inputs are those of the expert itself, on its own texts, one text at a time (nothing is padded). C is summed in
float32 and factorised in float64, with 1e-6 of its mean diagonal added to the diagonal; where rounding has left C
without a Cholesky factor, its eigenvectors serve (every L with L Lᵀ = C gives the same singular values).

**The rank cannot be higher than the number of tokens.** With fewer tokens than the layer has inputs, the effective rank
says as much about the texts as about the task vector; ``enough`` is then False.

Layers that read the same tensor (query, key, value; gate, up) share one C. All C's of a model can be more than the
model: they are made in passes over the texts, as many at a time as ``memory`` holds.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..checkpoints.layout import role
from ..errors import Cancelled, InputError, NumbersError
from ..networks import Network, run, threads_of_torch
from .matrices import Method
from .sensitivity import Example, Progress
from .spectra import Spectrum, check_method, spectrum_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

JITTER = 1e-6
MEMORY = 1 << 30
"""Bytes that the matrices C of one pass may take."""


@dataclass(slots=True)
class Linear:
    """One linear layer y = W x + b. ``transposed``: its weight is kept as (in, out), as GPT-2's Conv1D does."""

    name: str
    module: torch.nn.Module
    transposed: bool

    @property
    def weight(self) -> Tensor:
        import torch

        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight.detach()

    def oriented(self, matrix: Tensor) -> Tensor:
        """A matrix in the shape of the weight, as (out, in)."""
        return matrix.T if self.transposed else matrix


@dataclass(slots=True)
class Input:
    """One tensor that linear layers read. ``calls``: how often in a forward pass (1, unless weights are shared)."""

    width: int
    calls: int
    layers: list[Linear]

    @property
    def bytes(self) -> int:
        return 4 * self.width**2


@dataclass(slots=True)
class WhitenedSpectrum:
    """The spectrum of τL of one tensor, as (out, in), with ‖W₀L‖_F as the norm of its base. ``tokens``: n; ``enough``:
    n is at least the number of the layer's inputs."""

    block: int | None
    kind: str
    spectrum: Spectrum
    tokens: int
    enough: bool


@dataclass(slots=True)
class Whitened:
    """All spectra of one expert. ``skipped``: (tensor, why); ``passes``: how often the texts were read."""

    spectra: list[WhitenedSpectrum]
    skipped: list[tuple[str, str]]
    passes: int


def measure_whitened(
    network: Network,
    examples: Sequence[Example],
    task_vector: Callable[[str], Tensor | None],
    *,
    of: str = "",
    method: Method = "gram",
    memory: int = MEMORY,
    threads: int = 1,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Whitened:
    """Whitened spectra of the linear layers of ``network``, the expert.

    Args:
        examples: what it is shown, one at a time.
        task_vector: name of a tensor in the files -> expert minus base in the tensor's shape; None if there is none.
        of: the expert's name, for the spectra.
        method: how singular values are computed, see ``spectra.spectrum_of``.
        memory: bytes for the matrices C of one pass; one that is larger is made all the same, alone.
        progress: called with (steps done, steps in all, "whitened"): texts of all passes, then tensors.

    The output head of a language model is skipped: its spectrum is that of the vocabulary. Further memory: the network,
    one text's activations, and 8·(in² + 3·in·out) bytes for the layer at hand.

    Raises:
        InputError: ``E_TEXT`` without examples; ``E_NOT_A_MODEL`` if there is no linear layer.
        NumbersError: ``E_LOSS``, naming the text, if an input of a layer is NaN or infinite.
        Cancelled: soon after ``stop`` was set.
    """
    import torch

    if not examples:
        raise InputError("E_TEXT", "There is no text to whiten with.", "", "Give at least one.")
    check_method(method)
    found = Whitened([], [], 0)
    with threads_of_torch(threads), torch.no_grad():
        inputs, found.skipped = find_inputs(network, examples[0])
        if not inputs:
            raise InputError("E_NOT_A_MODEL", f"{network.path} has no linear layer.", "", "Choose another model.")
        parts = list(_portions(inputs, memory))
        steps = len(parts) * len(examples) + sum(len(one.layers) for one in inputs)
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            if progress:
                progress(done, steps, "whitened")
            if stop is not None and stop.is_set():
                raise Cancelled()

        for part in parts:
            found.passes += 1
            grams, tokens = _second_moments(network, examples, part, step)
            for number, one in enumerate(part):
                gram, grams[number] = grams[number], torch.empty(0)
                root = factor(gram)
                for layer in one.layers:
                    tau = task_vector(layer.name)
                    if tau is None or tau.shape != layer.weight.shape:
                        found.skipped.append((layer.name, "no task vector of this shape"))
                    elif root is None:
                        found.skipped.append((layer.name, "its input is zero on all texts"))
                    else:
                        found.spectra.append(_spectrum(layer, tau.double(), root, tokens[number], of, method))
                    step()
    found.spectra.sort(key=lambda one: (one.block is None, one.block or 0))
    return found


def _spectrum(layer: Linear, tau: Tensor, root: Tensor, tokens: int, of: str, method: Method) -> WhitenedSpectrum:
    spectrum = spectrum_of(layer.oriented(tau) @ root, method)
    spectrum.tensor, spectrum.of = layer.name, of
    spectrum.base_frobenius = float((layer.oriented(layer.weight.double() - tau) @ root).norm())
    place = role(layer.name, tuple(tau.shape))
    return WhitenedSpectrum(place.block, place.kind, spectrum, tokens, tokens >= root.shape[0])


def factor(gram: Tensor) -> Tensor | None:
    """L, float64, with L Lᵀ = C + 1e-6 mean(diag C) I, for a symmetric C that is positive but for rounding.

    Lower triangular (Cholesky) if C allows, else the eigenvectors scaled by the roots of the eigenvalues, those below
    zero taken as zero. None if C is zero.
    """
    import torch

    matrix = gram.double()
    matrix = (matrix + matrix.T) / 2
    mean = float(matrix.diagonal().mean())
    if mean == 0:
        return None
    matrix.diagonal().add_(JITTER * mean)
    root, failed = torch.linalg.cholesky_ex(matrix)
    if not int(failed):
        return root
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min_(0).sqrt_()


# ------------------------------------------------------------------------------------------ who reads which tensor


def find_inputs(network: Network, example: Example) -> tuple[list[Input], list[tuple[str, str]]]:
    """(the inputs of linear layers in the order in which they are needed, skipped layers with the reason).

    Found by one forward pass: layers that are called with the very same tensor, every time, share an input.
    """
    names = {id(parameter): name for name, parameter in network.parameters()}
    heads = {id(head) for head in _heads(network.module)}
    calls: dict[int, list[tuple]] = {}
    kept = []  # a tensor that is kept alive cannot be mistaken for a later one in the same place
    layers: list[Linear] = []
    skipped: list[tuple[str, str]] = []
    for module in network.module.modules():
        transposed = type(module).__name__ == "Conv1D"
        weight = getattr(module, "weight", None)
        if not (transposed or _is_linear(module)) or weight is None or weight.ndim != 2:
            continue
        name = names.get(id(weight), "")
        if id(module) in heads:
            skipped.append((name, "the output head of a language model"))
        elif not weight.is_floating_point() or not name:
            skipped.append((name or type(module).__name__, "not a plain linear layer"))
        else:
            layers.append(Linear(name, module, transposed))

    def note(module: torch.nn.Module, given: tuple) -> None:
        x = given[0]
        kept.append(x)
        calls.setdefault(id(module), []).append((x.data_ptr(), x.shape, x.stride(), x._version))

    _forward(network, example, {id(layer.module): (layer.module, note) for layer in layers})
    inputs: dict[tuple, Input] = {}
    order = {module: number for number, module in enumerate(calls)}  # dictionaries keep the order of the first call
    for layer in sorted(layers, key=lambda layer: order.get(id(layer.module), len(order))):
        reads = calls.get(id(layer.module))
        if reads is None:
            skipped.append((layer.name, "the forward pass does not use it"))
            continue
        width = layer.oriented(layer.weight).shape[1]
        inputs.setdefault(tuple(reads), Input(width, len(reads), [])).layers.append(layer)
    return list(inputs.values()), skipped


def _is_linear(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear)


def _heads(module: Any) -> list[Any]:
    """The module from hidden states to the vocabulary, if there is one."""
    try:
        head = module.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    return [] if head is None else [head]


def _portions(inputs: Sequence[Input], memory: int) -> Iterator[list[Input]]:
    """Neighbouring inputs whose matrices fit into the memory together; at least one at a time."""
    portion: list[Input] = []
    for one in inputs:
        if portion and sum(other.bytes for other in portion) + one.bytes > memory:
            yield portion
            portion = []
        portion.append(one)
    yield portion


class _Enough(Exception):
    """Ends a forward pass: what was asked for has been seen."""


def _second_moments(
    network: Network, examples: Sequence[Example], part: Sequence[Input], step: Callable[[], None]
) -> tuple[list[Tensor], list[int]]:
    """For each input (1/n) Σ x xᵀ in float32, and n. One pass over the examples, each only as deep as needed."""
    import torch

    grams = [torch.zeros(one.width, one.width, device=network.device) for one in part]
    tokens = [0] * len(part)
    once = all(one.calls == 1 for one in part)

    def adder(number: int) -> Callable[[torch.nn.Module, tuple], None]:
        def add(module: torch.nn.Module, given: tuple) -> None:
            x = given[0].reshape(-1, part[number].width)
            grams[number].addmm_(x.T, x)
            tokens[number] += x.shape[0]
            if once and number == len(part) - 1:
                raise _Enough

        return add

    first = {id(one.layers[0].module): (one.layers[0].module, adder(number)) for number, one in enumerate(part)}
    for example in examples:
        _forward(network, example, first)
        if not all(math.isfinite(float(gram.diagonal().sum())) for gram in grams):
            what = f"An input of a layer is NaN or infinite on {example.where}."
            why = f"{network.path} gives no usable numbers on this text."
            raise NumbersError("E_LOSS", what, why, "Check the model, or leave the text out.")
        step()
    return [gram.div_(count) for gram, count in zip(grams, tokens, strict=True)], tokens


def _forward(network: Network, example: Example, hooks: dict[int, tuple[Any, Callable]]) -> None:
    """One forward pass with hooks before the given modules."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.values()]
    try:
        run(network, example.inputs(), example.where)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
