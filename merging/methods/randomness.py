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

_PER_COUNTER = 16
"""One step of the counter gives 4 × 64 bits = sixteen 16-bit numbers."""


def stream_key(seed: int, tensor: str, expert: int, purpose: str) -> np.ndarray:
    """128 key bits: the start of SHA-256 over everything that names the stream."""
    digest = hashlib.sha256(f"{seed}\0{tensor}\0{expert}\0{purpose}".encode()).digest()
    return np.frombuffer(digest[:16], dtype=np.uint64)


def keep_mask(block: Block, expert: int, probability: float) -> Tensor:
    """A 0/1 tensor in the compute dtype; each entry is 1 with ``probability``, independently.

    One 16-bit number per entry decides, and where it hits the limit exactly (one entry in 65,536) further
    bits do, so the probability is met to 2⁻⁴⁸ and not only to 2⁻¹⁶.
    """
    size = block.like.numel()
    key = stream_key(block.seed, block.tensor, expert, "keep")
    numbers = _uniform16(key, block.start, size)
    limit = int(probability * 65536)
    rest = probability * 65536 - limit
    mask = block.buffer("mask")
    # int16 is the widest 16-bit type that all devices compare: shift the range instead of the type
    shifted = (numbers ^ np.uint16(0x8000)).view(np.int16)
    host = torch.from_numpy(shifted)
    source = host if mask.device.type == "cpu" else host.to(mask.device)
    torch.lt(mask.copy_(source), float(limit - 32768), out=mask)
    if rest:
        for place in np.flatnonzero(numbers == limit) if limit < 65536 else ():
            if _uniform(key, block.start + int(place)) < rest:
                mask[int(place)] = 1
    return mask


def _uniform16(key: np.ndarray, start: int, size: int) -> np.ndarray:
    """Numbers ``start`` … ``start + size`` of the stream ``key``, as uint16."""
    skip = start % _PER_COUNTER
    words = -(-(skip + size) // 4)
    generator = np.random.Philox(key=key, counter=start // _PER_COUNTER)
    return generator.random_raw(words).view(np.uint16)[skip : skip + size]


def _uniform(key: np.ndarray, index: int) -> float:
    """One more number in [0, 1) for the entry ``index``, from counters far beyond those of the mask."""
    generator = np.random.Philox(key=key, counter=np.array([index, 0, 0, 1], dtype=np.uint64))
    return int(generator.random_raw()) / 2**64
