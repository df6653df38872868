"""A Hub to download from, and somebody who does; each test file has its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.checkpoints.hub_user import FILES, User
from tests.checkpoints.stand_in_hub import StandInHub


@pytest.fixture(scope="module")
def hub() -> Iterator[StandInHub]:
    server = StandInHub()
    yield server
    server.close()


@pytest.fixture(scope="module")
def user(hub: StandInHub) -> Iterator[User]:
    one = User(hub)
    yield one
    one.close()


@pytest.fixture
def name(hub: StandInHub, request: pytest.FixtureRequest) -> str:
    """A repository of this test's own with FILES in it."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name[5:60]).strip("-").replace("--", "-")
    hub.add(f"org/{name}", FILES)
    return f"org/{name}"
