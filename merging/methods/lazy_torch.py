"""``torch``, imported when a kernel first needs it.

Planning a merge reads headers and checks parameters; it must not wait a second or more for torch.
The kernels write ``torch.sub(...)`` as usual; each name is looked up once and then kept, so that the
inner loop pays nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
else:

    class _LazyTorch:
        def __getattr__(self, name: str) -> Any:
            import torch as module

            value = getattr(module, name)
            setattr(self, name, value)
            return value

    torch = _LazyTorch()

__all__ = ["torch"]
