"""The OpenAPI document of the session API is a contract; generated requests, valid and not, hold the server to it."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import checks

from deltamem_vllm.demo.server import VllmServer
from tests.conftest import NIGHTLY
from tests.server.talk import API_KEY, Talk, new_session

ROOT = "/v1/sessions"
EXAMPLES = 200 if NIGHTLY else 5


def operations(server: VllmServer) -> Iterator[Any]:
    schema = schemathesis.openapi.from_url(f"{server.base_url}/openapi.json").include(path_regex=f"^{ROOT}")
    for result in schema.get_all_operations():
        yield result.ok()


def why_broken(operation: Any, mode: Any, known: str, statuses: Counter[int]) -> str:
    """What generated requests of one route show to be wrong; empty: nothing."""

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def holds(case: Any) -> None:
        if mode == schemathesis.GenerationMode.POSITIVE and case.path_parameters and statuses.total() % 2:
            case.path_parameters["session_id"] = known
        response = case.call(headers={"Authorization": f"Bearer {API_KEY}"}, timeout=60)
        statuses[response.status_code] += 1
        unsaid = [checks.positive_data_acceptance]  # a schema knows no versions, and not what an export is
        inexpressible = response.status_code == 412 or operation.path.endswith("/import")
        case.validate_response(response, excluded_checks=unsaid if inexpressible else [])

    try:
        holds()
    except (AssertionError, BaseExceptionGroup) as e:  # noqa: F821 (Python 3.11)
        return f"{operation.method} {operation.path} {mode}: {e} {getattr(e, 'exceptions', '')}"
    return ""


def test_every_route_keeps_its_contract(talk: Talk, server: VllmServer) -> None:
    """Generated requests, valid ones and others: no 5xx, and every answer as the OpenAPI document says."""
    known = talk.post(ROOT, json={"id": new_session()}).json()["id"]
    statuses: Counter[int] = Counter()
    modes = list(schemathesis.GenerationMode)
    broken = [why_broken(each, mode, known, statuses) for each in operations(server) for mode in modes]
    print(f"{statuses.total()} generated requests: {dict(sorted(statuses.items()))}")
    assert not any(broken), "\n".join(filter(None, broken))
    assert statuses.total() > 100
    assert max(statuses) < 500
