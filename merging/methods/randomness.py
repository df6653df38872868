"""Random masks that depend on nothing but (seed, tensor name, expert, flat index).

DARE drops entries at random. If the numbers came from a running generator, the result would change with
the order of tensors, the block size, the threads, the device and a resume. A counter-based generator
(Philox 4×64-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; numpy's
implementation) gives the i-th number of a stream directly: the key is a hash of seed, tensor and expert,
the counter is the element's place (rule N3).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from .base import Block
from .lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


def stream_key(seed: int, tensor: str, expert: int, purpose: str) -> np.ndarray:
    """128 key bits: BLAKE2b over everything that names the stream."""
    digest = hashlib.blake2b(f"{seed}\0{tensor}\0{expert}\0{purpose}".encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype=np.uint64)


def keep_mask(block: Block, expert: int, probability: float) -> Tensor:
    """A 0/1 tensor in the compute dtype; each entry is 1 with ``probability``, independently.

    If the probability is a multiple of 1/256, a random byte per entry decides. Otherwise 16 bits do, and where
    they hit the limit exactly (one entry in 65,536) further bits, so that the probability is met to 2⁻⁶⁴.
    """
    key = stream_key(block.seed, block.tensor, expert, "keep")
    mask = block.buffer("mask")
    if probability * 256 == int(probability * 256):
        numbers = _numbers(key, block.start, mask.numel(), np.dtype(np.uint8))
        return torch.lt(_on(mask, torch.from_numpy(numbers)), int(probability * 256), out=mask)
    numbers = _numbers(key, block.start, mask.numel(), np.dtype(np.uint16))
    limit = int(probability * 65536)
    # int16 is the widest 16-bit type that all devices compare: shift the range instead of the type
    shifted = torch.from_numpy((numbers ^ np.uint16(0x8000)).view(np.int16))
    torch.lt(_on(mask, shifted), limit - 32768, out=mask)
    for place in np.flatnonzero(numbers == limit):
        if _uniform(key, block.start + int(place)) < probability * 65536 - limit:
            mask[int(place)] = 1
    return mask


def _on(mask: Tensor, numbers: Tensor) -> Tensor:
    return numbers if mask.device.type == "cpu" else numbers.to(mask.device)


def _numbers(key: np.ndarray, start: int, size: int, dtype: np.dtype) -> np.ndarray:
    """Numbers ``start`` … ``start + size`` of the stream ``key``. A step of the counter gives 4 × 64 bits."""
    per_word = 8 // dtype.itemsize
    skip = start % (4 * per_word)
    generator = np.random.Philox(key=key, counter=start // (4 * per_word))
    return generator.random_raw(-(-(skip + size) // per_word)).view(dtype)[skip : skip + size]


def _uniform(key: np.ndarray, index: int) -> float:
    """One more number in [0, 1) for the entry ``index``, from counters far beyond those of the mask."""
    generator = np.random.Philox(key=key, counter=np.array([index, 0, 0, 1], dtype=np.uint64))
    return int(generator.random_raw()) / 2**64
