"""The campaigns of `test_isolation` on a server with bugs put in on purpose: each must be caught."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server import guarded as setup
from tests.server.guarded import FACT, Guarded, new_id, probe, share, traces
from tests.server.talk import ok

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def g(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with setup.guarded(adapter, tmp_path_factory.mktemp("planted"), plant="tenants,ids") as made:
        yield made


def test_probes_see_a_tenant_left_out_of_the_key(g: Guarded) -> None:
    leaks = probe(g, 60, 1)
    assert len(leaks) > 10
    assert any("the answer differs" in leak or "x-session-version" in leak for leak in leaks)
    assert "a session of another tenant was changed" in leaks


def test_pairs_see_a_tenant_left_out_of_the_salt(g: Guarded) -> None:
    shared, _ = share(g, len(setup.PAIRS), 1)
    for who in ("('b', None, None, None)", "('b', None, 'off', None)", "('b', '1', 'read', None)"):
        assert any(pair.startswith(who) for pair in shared), f"{who} is not among {shared}"


def test_traces_show_ids_that_are_written_down(g: Guarded) -> None:
    with g.talk("a") as talk:
        ok(talk.complete(FACT, new_id()))
        ok(talk.complete(FACT, session_id=new_id()))
        talk.get(f"/v1/sessions/{new_id()}")
    found = traces(g)
    assert found["KV events"]
    for what in ("JSON body", "GET /v1/sessions/"):
        assert any(what in line for line in found["log"]), what
