"""``GET /v1/sessions/{id}/state`` on a real server: the memory in numbers."""

import numpy as np
import pytest

from deltamem_vllm.store import codec
from tests.server.talk import Talk, new_session, ok, refused

FACT = list(range(64, 96))
ROOT = "/v1/sessions"


def test_it_shows_what_an_export_holds(talk: Talk) -> None:
    session = new_session()
    for version in (1, 2):
        ok(talk.complete([*FACT, version], session))
    for version in (1, 2):
        record = codec.decode(talk.get(f"{ROOT}/{session}/export", params={"version": version}).content)
        response = talk.get(f"{ROOT}/{session}/state", params={"version": version})
        assert response.headers["Cache-Control"] == "no-store"
        shown = ok(response)
        assert (shown["version"], shown["tokens"], shown["next"]) == (version, record.tokens, None)
        assert (len(shown["layers"]), shown["heads"], shown["rank"]) == record.end.shape[:3]
        values = np.array([layer["values"] for layer in shown["layers"]])
        np.testing.assert_allclose(values, record.end, rtol=1e-5, atol=0)
        for layer, end, base in zip(shown["layers"], record.end, record.base, strict=True):
            assert layer["norm"] == pytest.approx(np.linalg.norm(end), rel=1e-5)
            assert layer["change"] == pytest.approx(np.linalg.norm(end - base), rel=1e-5)
        assert shown["norm"] == pytest.approx(np.linalg.norm(record.end), rel=1e-5)
    assert ok(talk.get(f"{ROOT}/{session}/state")) == shown, "the latest, if no version is named"
    norms = ok(talk.get(f"{ROOT}/{session}/state", params={"values": "false"}))
    assert [layer["norm"] for layer in norms["layers"]] == [layer["norm"] for layer in shown["layers"]]
    assert all(layer["values"] is None for layer in norms["layers"])
    last = ok(talk.get(f"{ROOT}/{session}/state", params={"first": len(norms["layers"]) - 1}))
    assert [layer["values"] is not None for layer in last["layers"]][-2:] == [False, True]
    assert talk.version(session) == 2, "reading changes nothing"


def test_what_is_not_there(talk: Talk) -> None:
    session = new_session()
    refused(talk.get(f"{ROOT}/{session}/state"), 404, f"session '{session}' not found")
    ok(talk.complete(FACT, session))
    refused(talk.get(f"{ROOT}/{session}/state", params={"version": 7}), 404, "does not keep version 7")
    for wrong in ({"version": 0}, {"first": -1}, {"values": "perhaps"}):
        refused(talk.get(f"{ROOT}/{session}/state", params=wrong), 400)


def test_without_the_flag_there_is_no_page(talk: Talk) -> None:
    refused(talk.get(f"{ROOT}/ui"), 404, "session 'ui' not found")
    ok(talk.complete(FACT, "ui"))
    assert ok(talk.get(f"{ROOT}/ui"))["id"] == "ui", "its id is one like any other"
    ok(talk.delete(f"{ROOT}/ui"))
