"""Asking the Hugging Face Hub, and saying in plain words what it answers.

Everything goes through the session and the token of ``huggingface_hub``. Its answers and exceptions end here:
an answer becomes a ``Listing``, a failure a ``HubError`` that says what to do. No message quotes the failed
request, whose address may be signed and whose headers hold the token.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import HubError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

# Read when huggingface_hub is first imported, which happens in the functions below. Without it, that library
# tells the Hub about other software on this machine. Whoever wants that can set the variable to 0.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

COMMIT = re.compile(r"[0-9a-f]{40}")
CHECKSUM = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
RETRY_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between attempts that brought nothing new
LONGEST_WAIT = 60.0  # a Hub that asks for more patience than this gets an error message instead
_RETRY_STATUS = {408, 429, 500, 502, 503, 504}
# By name, because huggingface_hub 1 and 2 use different HTTP libraries.
_UNREACHABLE = {"ConnectError", "ConnectTimeout", "ProxyError"}


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a commit; ``checksum`` is its sha256 (64 hex digits) or its git sha1 (40)."""

    name: str
    size: int
    checksum: str


@dataclass(frozen=True, slots=True)
class Listing:
    """All that one commit holds, as the Hub states it (or, offline, as far as the cache knows it)."""

    repo_id: str
    revision: str
    commit: str
    files: dict[str, HubFile]
    complete: bool = True  # False: pieced together from the cache; other files may belong to the commit


class NoSuchModel(HubError):
    """E_HUB_NOT_FOUND about the repository itself, not about a revision of it."""


class Refused(Exception):
    """An answer with a status other than success."""

    def __init__(self, response: Any):
        self.response = response
        super().__init__()


def list_files(repo_id: str, revision: str) -> Listing:
    """Ask the Hub, with the user's own token: may this be read, which commit is it, which files does it hold?

    One request, and one more if the repository is gated (a gated listing is public, its files are not).
    Raises HubError: E_HUB_NOT_FOUND, E_HUB_GATED, E_HUB_OFFLINE, E_HUB_NETWORK.
    """
    from huggingface_hub import HfApi, constants

    _check_token()

    def ask() -> ModelInfo:
        info = HfApi(library_name="amalgam").model_info(
            repo_id, revision=revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        )
        if info.gated:  # what HfApi.auth_check asks, which has no time limit
            _get(f"/api/models/{repo_id}/auth-check")
        return info

    patience = Patience(repo_id, revision, time.sleep, RETRY_WAITS[:3], reached=False)
    while True:
        try:
            return _read_listing(ask(), repo_id, revision)
        except request_failures() as error:
            patience.bear(error)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _nonsense(repo_id, "It is not the description of a model.") from None


def _get(path: str, **parameters: str) -> Any:
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session

    response = get_session().get(
        constants.ENDPOINT + path,
        params=parameters,
        headers=build_hf_headers(library_name="amalgam"),
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
    )
    if response.status_code != 200:
        raise Refused(response)
    return response


def _read_listing(info: ModelInfo, repo_id: str, revision: str) -> Listing:
    commit = info.sha or ""
    if not COMMIT.fullmatch(commit) or (COMMIT.fullmatch(revision) and commit != revision):
        raise _nonsense(repo_id, "It names no commit, or another one than was asked for.")
    files = {}
    for sibling in info.siblings or []:
        lfs = sibling.lfs
        checksum, size = (lfs.sha256, lfs.size) if lfs else (sibling.blob_id, sibling.size)
        if isinstance(checksum, str) and CHECKSUM.fullmatch(checksum) and isinstance(size, int) and size >= 0:
            files[sibling.rfilename] = HubFile(sibling.rfilename, size, checksum)
        else:
            raise _nonsense(repo_id, f"It states no size and checksum for {sibling.rfilename[:200]!r}.")
    return Listing(repo_id, revision, commit, files)


def similar_names(repo_id: str) -> list[str]:
    """At most three repositories that may have been meant: of the same owner, or of the same name."""
    owner, name = repo_id.split("/")
    found: set[str] = set()
    no_answer = (*request_failures(), ValueError, KeyError, TypeError)
    for query in ({"author": owner}, {"search": name}):
        with contextlib.suppress(*no_answer):
            found |= {str(model["id"]) for model in _get("/api/models", limit="200", **query).json()}
    lower = {one.lower(): one for one in found if re.fullmatch(r"[\w.-]+/[\w.-]+", one, re.ASCII)}
    return [lower[one] for one in difflib.get_close_matches(repo_id.lower(), lower, cutoff=0.75)]


def request_failures() -> tuple[type[Exception], ...]:
    """What a failed request raises: the client's own error, the base class of its HTTP library, and ours."""
    from huggingface_hub.errors import HfHubHTTPError

    bases = (base for base in HfHubHTTPError.__bases__ if base is not OSError)
    return (HfHubHTTPError, *bases, ConnectionError, Refused)


def website() -> str:
    """The address of the Hub for messages, without a user name or password that it may hold."""
    from huggingface_hub import constants

    return re.sub(r"//[^/@]*@", "//", constants.ENDPOINT)


class Patience:
    """Decides after a failed request: wait and try again, or say what went wrong."""

    def __init__(
        self,
        repo_id: str,
        revision: str,
        pause: Callable[[float], Any],
        waits: Sequence[float],
        reached: bool,
    ):
        """``pause`` sleeps. ``reached``: the Hub has answered before, so a lost connection may come back."""
        self.repo_id, self.revision, self.pause = repo_id, revision, pause
        self.waits, self.reached, self.failures = waits, reached, 0

    def bear(self, error: Exception) -> None:
        """Return after a while if another attempt makes sense, else raise HubError."""
        status, asked = status_of(error), _asked_wait(error)
        hopeless = status is not None and status not in _RETRY_STATUS
        offline = not self.reached and type(error).__name__ in _UNREACHABLE
        if hopeless or offline or asked > LONGEST_WAIT or self.failures >= len(self.waits):
            raise explain(error, self.repo_id, self.revision) from None
        self.pause(max(asked, self.waits[self.failures]))
        self.failures += 1


def status_of(error: Exception) -> int | None:
    """The HTTP status that ``error`` is about, if there was an answer at all."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _asked_wait(error: Exception) -> float:
    """Seconds that the Hub asks to wait (``Retry-After: 5`` or ``RateLimit: "api";r=0;t=5``), or 0."""
    found = re.fullmatch(r"\s*(\d{1,9})\s*", _header(error, "Retry-After"))
    if not found and status_of(error) == 429:
        found = re.search(r";\s*t=(\d{1,9})", _header(error, "RateLimit"))
    return float(found.group(1)) if found else 0.0


def _header(error: Exception, name: str) -> str:
    return getattr(getattr(error, "response", None), "headers", {}).get(name, "")


# ------------------------------------------------------------------------------------------- plain words


def explain(error: Exception, repo_id: str, revision: str) -> HubError:
    """The typed error for a failed request."""
    from huggingface_hub.utils import get_token

    status, why_code, known = status_of(error), _header(error, "X-Error-Code"), get_token() is not None
    page = f"{website()}/{repo_id}"
    if why_code == "GatedRepo":
        return HubError(
            "E_HUB_GATED",
            f"{repo_id} is gated: its owner lets in only those who asked for access.",
            "Your access token has not been let in." if known else "You are not logged in.",
            f"Ask for access on {page}, {'' if known else 'run `hf auth login`, '}then run this again.",
        )
    if why_code == "RevisionNotFound":
        return HubError(
            "E_HUB_NOT_FOUND",
            f"{repo_id} has no revision {revision!r}.",
            "",
            f"See its branches and tags on {page}/tree/main.",
        )
    if status == 401 and "invalid credentials" in _header(error, "X-Error-Message").lower():
        return _bad_token("It was mistyped, revoked or has expired.")
    if why_code == "EntryNotFound":
        return HubError(
            "E_HUB_NOT_FOUND",
            f"The Hub lists a file of {repo_id} that it does not have.",
            "",
            f"Look at {page}/tree/main, or choose another revision.",
        )
    if status in (401, 404):
        return NoSuchModel(
            "E_HUB_NOT_FOUND",
            f"There is no model {repo_id} on the Hub that you may see.",
            f"The name is wrong, or it is private and {'not yours' if known else 'you are not logged in'}.",
            f"Check the name on {website()}{'' if known else ', or run `hf auth login`'}.",
        )
    if status == 403:
        return HubError(
            "E_HUB_GATED",
            f"The Hub does not let you read {repo_id}.",
            "Your access token lacks the permission, or the repository is disabled.",
            f"Look at {page} and at your token's permissions on {website()}/settings/tokens.",
        )
    if status == 429:
        seconds = _asked_wait(error)
        return HubError(
            "E_HUB_NETWORK",
            "You have asked the Hub too often for now (status 429).",
            f"It asks to wait {seconds:.0f} seconds." if seconds else "",
            "Wait, then run this again." + ("" if known else " Those who are logged in may ask more often."),
        )
    name = type(error).__name__
    if status is None and name in _UNREACHABLE:
        return HubError(
            "E_HUB_OFFLINE",
            f"{website()} cannot be reached.",
            "There is no network, a firewall in between, or a proxy that is not set.",
            "Check the network, then run this again: received bytes are kept.",
        )
    if status is not None:
        why = f"The Hub answered with status {status}."
    elif "Timeout" in name:
        why = "The Hub stopped answering."
    else:
        why = "The connection broke off again and again."
    fix = "Run this again later: received bytes are kept."
    return HubError("E_HUB_NETWORK", f"{repo_id} could not be downloaded.", why, fix)


def _check_token() -> None:
    """A token that cannot even be sent (typographic quotes, a line break) gets a message, not a traceback."""
    from huggingface_hub.utils import get_token

    token = get_token()
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise _bad_token("It holds characters that no token has.")


def _bad_token(why: str) -> HubError:
    return HubError(
        "E_HUB_GATED",
        "The Hub does not accept your access token.",
        why,
        "Run `hf auth login` again, or correct or remove the variable HF_TOKEN.",
    )


def _nonsense(repo_id: str, why: str) -> HubError:
    return HubError(
        "E_HUB_NETWORK",
        f"{website()} gave an answer about {repo_id} that makes no sense.",
        why,
        "Check HF_ENDPOINT and your proxy: something that is not a Hugging Face Hub may be answering.",
    )
