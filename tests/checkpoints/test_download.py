"""What can go wrong between the Hub's disk and ours: nothing wrong may come out, little may be sent twice."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from merging.checkpoints.hub_client import Patience, request_failures
from merging.errors import HubError
from tests.checkpoints.hub_user import FILES, LARGE, SMALL, WEIGHTS, User, asked, right
from tests.checkpoints.stand_in_hub import PIECE, Fault, StandInHub


def blobs(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("models--*/blobs/*")}


def parts(cache: Path) -> list[Path]:
    return list(cache.glob("models--*/.amalgam/*.part"))


def sent(hub: StandInHub, name: str) -> int:
    return sum(count for path, count in hub.sent.items() if f"/{name}/" in path)


# ------------------------------------------------------------------------------------------- damaged bytes


@pytest.mark.parametrize("file", [LARGE, SMALL])
def test_a_byte_damaged_on_its_way(file: str, name: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.faults[name, file] = Fault(flip=[7])
    assert right(user.resolve(name, tmp_path))
    assert asked(hub, name, file) == ["", ""]


@pytest.mark.parametrize("file", [LARGE, SMALL])
def test_a_byte_damaged_every_time(file: str, name: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.faults[name, file] = Fault(flip=[7, 7])
    answer = user.resolve(name, tmp_path)
    assert answer["code"] == "E_HUB_CHECKSUM" and file in answer["text"]
    assert asked(hub, name, file) == ["", ""]
    assert not list(tmp_path.rglob(file)) and len(blobs(tmp_path)) <= 1
    assert right(user.resolve(name, tmp_path))  # and the next try starts from nothing


def test_an_answer_longer_than_stated(name: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.faults[name, LARGE] = Fault(more=bytes(3000 * PIECE))
    assert user.resolve(name, tmp_path)["code"] == "E_HUB_CHECKSUM"
    assert sent(hub, name) < 2 * len(WEIGHTS) + 3000 * PIECE  # it hangs up, twice
    assert parts(tmp_path) == [] and not list(tmp_path.rglob(LARGE))


def test_an_answer_shorter_than_stated(name: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.faults[name, LARGE] = Fault(claim={"size": len(WEIGHTS) + 10})
    assert user.resolve(name, tmp_path)["code"] == "E_HUB_CHECKSUM"
    assert not list(tmp_path.rglob(LARGE))


@pytest.mark.parametrize("etag", ['"../../../../evil"', '"/tmp/evil"', "", '"another"'])
def test_etags_have_no_power(etag: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    name = f"org/etag-{abs(hash(etag))}"
    hub.add(name, FILES)
    for file in FILES:
        headers = {"ETag": etag, "X-Linked-Etag": etag, "X-Repo-Commit": "../../x"}
        hub.faults[name, file] = Fault(headers=headers)
    cache = tmp_path / "a" / "b" / "c"
    assert right(user.resolve(name, cache))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"c"}
    assert all(len(name) in (40, 64) for name in blobs(cache))


# ------------------------------------------------------------------------------------------- cut connections


def test_a_cut_download_goes_on_where_it_was(name: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.faults[name, LARGE] = Fault(cut_after=[10 * PIECE, 10 * PIECE, 5 * PIECE, 3], pause=0.001)
    assert right(user.resolve(name, tmp_path))
    ranges = asked(hub, name, LARGE)
    starts = [int(one.removeprefix("bytes=").rstrip("-") or 0) for one in ranges]
    assert len(ranges) == 5 and starts == sorted(starts) and starts[1] > 0
    assert sent(hub, name) <= len(WEIGHTS) * 1.1 + 4 * 65536


def test_many_schedules_of_cuts(hub: StandInHub, user: User, tmp_path: Path) -> None:
    chance = random.Random(1)
    for number in range(25):
        name = f"org/cuts-{number}"
        cuts = [chance.randrange(1, 20 * PIECE) for _ in range(chance.randrange(1, 6))]
        hub.add(name, FILES)
        hub.faults[name, LARGE] = Fault(cut_after=list(cuts), ignore_range=chance.random() < 0.2)
        hub.faults[name, SMALL] = Fault(cut_after=[3] if chance.random() < 0.3 else [])
        answer = user.resolve(name, tmp_path)
        for _ in cuts:  # three fruitless attempts in a row are an error; the user then tries again
            if "path" in answer:
                break
            assert answer["code"] == "E_HUB_NETWORK", (number, cuts, answer)
            answer = user.resolve(name, tmp_path)
        assert right(answer), (number, cuts)


def test_a_server_that_ignores_ranges(name: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.faults[name, LARGE] = Fault(cut_after=[20 * PIECE, 30 * PIECE], ignore_range=True, pause=0.001)
    assert right(user.resolve(name, tmp_path))
    assert [bool(one) for one in asked(hub, name, LARGE)] == [False, True, True]


def test_a_server_that_sends_another_range(name: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    other = {"Content-Range": "bytes 5-9/10"}
    hub.faults[name, LARGE] = Fault(cut_after=[20 * PIECE], headers=other, pause=0.001)
    assert right(user.resolve(name, tmp_path))
    assert [bool(one) for one in asked(hub, name, LARGE)] == [False, True, False]


def test_cut_for_ever(name: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.faults[name, LARGE] = Fault(cut_after=[0] * 50)
    answer = user.resolve(name, tmp_path)
    assert answer["code"] == "E_HUB_NETWORK" and "again and again" in answer["text"]
    assert len(asked(hub, name, LARGE)) == 3


def test_cuts_that_never_get_further(name: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.faults[name, LARGE] = Fault(cut_after=[20 * PIECE, 19 * PIECE] * 50, ignore_range=True)
    assert user.resolve(name, tmp_path)["code"] == "E_HUB_NETWORK"
    assert len(asked(hub, name, LARGE)) < 10


def test_patience_without_a_network() -> None:
    """At the start no connection means offline: say so at once. In the middle of a download it may come back."""
    from huggingface_hub.utils import get_session

    for reached, waits in ((False, []), (True, [0.1, 0.2])):
        waited: list[float] = []
        patience = Patience("org/name", "main", waited.append, (0.1, 0.2), reached)
        with pytest.raises(HubError) as caught:
            while True:
                try:
                    get_session().get("http://127.0.0.1:9/")
                except request_failures() as error:
                    patience.bear(error)
        assert caught.value.code == "E_HUB_OFFLINE" and waited == waits


def test_a_server_that_stops_answering(name: str, hub: StandInHub, tmp_path: Path) -> None:
    hub.faults[name, LARGE] = Fault(pause=2.5)
    impatient = User(hub, HF_HUB_DOWNLOAD_TIMEOUT="1")
    try:
        answer = impatient.resolve(name, tmp_path)
    finally:
        impatient.close()
    assert answer["code"] == "E_HUB_NETWORK" and "stopped answering" in answer["text"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server(status: int, name: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.faults[name, SMALL] = Fault(status=[status, status])
    hub.faults[name, LARGE] = Fault(status=[status])
    assert right(user.resolve(name, tmp_path))
    hub.faults[name, SMALL] = Fault(status=[status] * 9)
    answer = user.resolve(name, tmp_path / "other")
    assert answer["code"] == "E_HUB_NETWORK" and f"status {status}" in answer["text"]


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, "E_HUB_NETWORK"), (403, "E_HUB_GATED"), (404, "E_HUB_NOT_FOUND"), (204, "E_HUB_NETWORK")],
)
def test_a_file_that_is_refused(status: int, code: str, name: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.faults[name, LARGE] = Fault(status=[status])
    assert user.resolve(name, tmp_path)["code"] == code
    assert len([line for line in hub.requests(name) if line.endswith(f"/resolve/@/{LARGE}")]) == 1


def test_a_redirect_in_a_circle(name: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    commit = hub.repositories[name].revisions["main"]
    here = f"{hub.url}/{name}/resolve/{commit}/{SMALL}"
    hub.faults[name, SMALL] = Fault(status=[302] * 1000, headers={"Location": here})
    assert user.resolve(name, tmp_path)["code"] == "E_HUB_NETWORK"


# --------------------------------------------------------------------------------------- stopped and resumed


def wait_for_part(cache: Path, size: int) -> None:
    deadline = time.monotonic() + 30
    while not any(path.stat().st_size >= size for path in parts(cache)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_and_resumed(name: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.faults[name, LARGE] = Fault(pause=0.05)
    victim = User(hub)
    victim.start("resolve", tmp_path, text=name)
    wait_for_part(tmp_path, 10 * PIECE)
    victim.kill()
    victim.close()
    kept = parts(tmp_path)[0].stat().st_size
    assert not list(tmp_path.rglob(LARGE))
    hub.faults.clear()
    answer = user.resolve(name, tmp_path)
    assert right(answer) and parts(tmp_path) == []
    assert asked(hub, name, LARGE)[1] == f"bytes={kept}-" and kept >= 10 * PIECE


def test_a_part_that_was_damaged_meanwhile(name: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    user.resolve(name, tmp_path, cancel_at=0)
    commit = hub.repositories[name].revisions["main"]
    ours = next(tmp_path.glob("models--*")) / ".amalgam"
    ours.mkdir(exist_ok=True)
    user.resolve(name, tmp_path)
    blob = (tmp_path / ours.parent.name / "snapshots" / commit / LARGE).resolve()
    for content in (b"x" * 1000, b"x" * len(WEIGHTS), b"x" * (len(WEIGHTS) + 1)):
        blob.rename(ours / f"{blob.name}.part")
        (ours / f"{blob.name}.part").write_bytes(content)
        assert right(user.resolve(name, tmp_path))
        assert asked(hub, name, LARGE)[-1] == ""


def test_cancelled_and_resumed(name: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.faults[name, LARGE] = Fault(pause=0.2)  # 8 seconds for all
    start = time.monotonic()
    answer = user.resolve(name, tmp_path, cancel_at=3 * PIECE)
    assert answer["code"] == "E_CANCELLED" and time.monotonic() - start < 4.0
    kept = parts(tmp_path)[0].stat().st_size
    assert kept >= 3 * PIECE
    hub.faults.clear()
    answer = user.resolve(name, tmp_path)
    assert right(answer)
    done, total, _ = answer["progress"][0]
    assert total == len(WEIGHTS) + len(FILES[SMALL])
    assert int(asked(hub, name, LARGE)[1].removeprefix("bytes=").rstrip("-")) >= kept


def test_progress(name: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.faults[name, LARGE] = Fault(pause=0.01)
    seen = user.resolve(name, tmp_path)["progress"]
    done, total = [one[0] for one in seen], {one[1] for one in seen}
    assert done == sorted(done) and done[-1] == len(WEIGHTS) + len(FILES[SMALL])
    assert total == {len(WEIGHTS) + len(FILES[SMALL])} and len(set(done)) >= 4
    assert {one[2] for one in seen[1:]} <= {LARGE, SMALL}


def test_two_at_once_fetch_each_file_once(name: str, hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.faults[name, LARGE] = Fault(pause=0.02)
    answers: list[dict] = []
    second = User(hub)
    try:
        threads = [
            threading.Thread(target=lambda who=who: answers.append(who.resolve(name, tmp_path)))
            for who in (user, second)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        second.close()
    assert [right(answer) for answer in answers] == [True, True]
    assert asked(hub, name, LARGE) == [""] and parts(tmp_path) == []


def test_two_equal_files(hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.add("org/twins", {**FILES, "vocab.json": FILES[SMALL]})
    answer = user.resolve("org/twins", tmp_path)
    assert right(answer) and answer["files"] == [SMALL, LARGE, "vocab.json"]


def test_an_empty_file_needs_no_request(hub: StandInHub, user: User, tmp_path: Path) -> None:
    hub.add("org/empty", {**FILES, "merges.txt": b""})
    answer = user.resolve("org/empty", tmp_path)
    assert right(answer) and (Path(answer["path"]) / "merges.txt").read_bytes() == b""
