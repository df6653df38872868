"""Previews: a merge in memory, scored and asked while its sliders move.

``client.py`` is what one uses: ``Preview``. ``room.py`` says whether there is memory enough, ``worker.py`` is the child
process behind it, ``merge.py`` merges (``keys.py``: and only what must be), ``network.py`` runs the result.
"""

from .client import Preview
from .room import Cost

__all__ = ["Cost", "Preview"]
