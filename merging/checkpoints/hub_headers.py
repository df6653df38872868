"""Headers of models that are still on the Hub: enough to know whether a merge would work, before gigabytes move.

A safetensors file begins with its table of tensors. So the first kilobytes of each weight file are received and put
at the beginning of a file that is as long as the real one and otherwise a hole, which takes no room on the disk. What
looks at headers cannot tell the difference; what reads weights never comes here, because ``hub.resolve`` does not.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import HubError, InputError
from .disk import write_whole, writing
from .download import Download, Progress, RepositoryCache
from .header import LARGEST_HEADER
from .hub import INDEX, SINGLE, Resolved, _ask, _needed, _shards, parse_reference
from .hub_client import HubFile, Listing, Refused, explain, request_failures

HEADERS_ONLY = "Only its headers are here."
"""Among the warnings of a ``Resolved`` whose weights must not be read."""
LARGEST_SIDE_FILE = 50_000_000
WORKERS = 4
_COMMIT = ".commit"


def find_headers(text: str, folder: Path) -> Resolved | None:
    """What ``bring_headers`` has brought before; None if nothing."""
    reference = parse_reference(text)
    if reference.path is not None:
        return None
    place = _place(folder, reference.repo_id, reference.revision)
    try:
        commit = (place / _COMMIT).read_text("ascii")
    except (OSError, ValueError):
        return None
    return Resolved(place, f"{reference.repo_id}@{commit}", reference.repo_id, commit, (HEADERS_ONLY,))


def bring_headers(text: str, folder: Path, progress: Progress | None = None) -> Resolved:
    """Ask the Hub for side files and headers of a model, and keep them below ``folder``.

    ``progress``: files that are here, files in all, name. Raises what ``hub.resolve`` raises; InputError E_HEADER_SIZE.
    """
    reference = parse_reference(text)
    if reference.path is not None:
        return Resolved(reference.path, text)
    repo_id, revision = reference.repo_id, reference.revision
    cache = RepositoryCache(repo_id)
    listing = _ask(repo_id, revision, cache)
    download = Download(listing, cache, offline=False)
    shards = None
    if INDEX in listing.files and SINGLE not in listing.files:
        shards = _shards(download.bring([INDEX]) / INDEX, f"{repo_id}@{listing.commit}")
    needed = _needed(listing, shards, False)
    weights = [name for name in needed if name.endswith(".safetensors")]
    small = [n for n in needed if n not in weights and listing.files[n].size <= LARGEST_SIDE_FILE]
    place = _place(folder, repo_id, revision)
    with writing(place):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        snapshot = download.bring(small)
        for name in small:
            (place / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(snapshot / name, place / name)
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="headers") as pool:
        waiting = {name: pool.submit(_header, listing, listing.files[name]) for name in weights}
        for number, (name, head) in enumerate(waiting.items()):
            if progress:
                progress(number, len(weights), name)
            with writing(place / name):
                write_whole(place / name, head.result())
                os.truncate(place / name, listing.files[name].size)
    with writing(place):
        write_whole(place / _COMMIT, listing.commit.encode())
    return Resolved(place, f"{repo_id}@{listing.commit}", repo_id, listing.commit, (HEADERS_ONLY,))


def _header(listing: Listing, file: HubFile) -> bytes:
    """The first bytes of a weight file: the length of the header, and the header."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session

    address = hf_hub_url(listing.repo_id, file.name, revision=listing.commit)
    headers = {**build_hf_headers(library_name="amalgam"), "Accept-Encoding": "identity"}
    received, wanted = bytearray(), 8
    try:
        seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", address, headers=headers, timeout=seconds) as response:
            if response.status_code != 200:
                raise Refused(response)
            for piece in response.iter_bytes(65_536):
                received += piece
                if wanted == 8 and len(received) >= 8:
                    wanted = 8 + int.from_bytes(received[:8], "little")
                    if wanted > min(LARGEST_HEADER + 8, file.size):
                        what = f"{file.name} of {listing.repo_id} has no header of a safetensors file."
                        raise InputError("E_HEADER_SIZE", what, "", "Choose another model.")
                if len(received) >= wanted:
                    return bytes(received[:wanted])
    except request_failures() as error:
        raise explain(error, listing.repo_id, listing.revision) from None
    what = f"{file.name} of {listing.repo_id} ended before its header did."
    raise HubError("E_HUB_NETWORK", what, "", "Look again later, or choose another model.")


def _place(folder: Path, repo_id: str, revision: str) -> Path:
    return folder / f"{repo_id}@{revision}".replace("/", "--")
