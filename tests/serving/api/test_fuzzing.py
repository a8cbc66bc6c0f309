"""Requests made from the server's own OpenAPI schema, valid and invalid ones: never a 500, always one shape of error.

The queue is full meanwhile, so that what is accepted is answered with 429 and costs no device time.
"""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from tests.serving.conftest import KEY, PROMPT, wait_until

ENDPOINTS = [
    "POST /v1/images/generations",
    "POST /v1/images/edits",
    "GET /v1/images/{image_id}/content",
    "POST /v1/chat/completions",
    "POST /v1/responses",
    "GET /v1/responses/{response_id}",
    "POST /v1/loops",
    "GET /v1/loops",
    "GET /v1/loops/{loop_id}",
    "GET /v1/loops/{loop_id}/events",
    "GET /v1/loops/{loop_id}/archive",
    "GET /v1/loops/{loop_id}/input_images",
    "POST /v1/loops/{loop_id}/accept",
    "POST /v1/loops/{loop_id}/cancel",
    "POST /v1/loops/{loop_id}/plan",
    "POST /v1/loops/{loop_id}/rollback",
    "POST /v1/loops/{loop_id}/branch",
    "DELETE /v1/loops/{loop_id}",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "GET /v1/server",
    "GET /health",
    "GET /ready",
    "GET /version",
    "GET /metrics",
]
NO_JSON = ("/metrics", "/events", "/archive", "/content", "/", ".js", ".css", ".html")


@pytest.fixture(scope="module")
def schema(server):
    with server.client() as client:
        return schemathesis.openapi.from_dict(client.get("/openapi.json").json())


@pytest.fixture(scope="module")
def finished(server):
    """The id of a finished loop."""
    with server.client() as client:
        body = {"prompt": PROMPT, "mode": "one-shot", "seed": 1}
        loop_id = client.post("/v1/images/generations", json=body).json()["data"][0]["loop_id"]
    wait_until(lambda: not server.service.jobs)
    return loop_id


def test_every_endpoint_is_fuzzed(schema):
    described = {f"{each.ok().method.upper()} {each.ok().path}" for each in schema.get_all_operations()}
    assert {each for each in described if "/v1/" in each} <= set(ENDPOINTS)
    assert set(ENDPOINTS) <= described


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_no_request_is_answered_with_a_500(endpoint, schema, finished, http, gate, server):
    while http.post("/v1/loops", json={"prompt": PROMPT}).status_code == 202:
        pass
    method, path = endpoint.split()
    operation = schema[path][method]
    modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
    parameters = [each for each in (operation.path_parameters, operation.query, operation.headers) if list(each)]
    has_input = bool(parameters or list(operation.body))
    strategy = st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes[: 2 if has_input else 1]])
    is_kept = method != "DELETE"

    @settings(
        max_examples=12 if has_input else 1,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy, is_known=st.booleans())
    def fuzz(case, is_known):
        if is_known and is_kept and "loop_id" in (case.path_parameters or {}):
            case.path_parameters["loop_id"] = finished
        response = case.call(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
        assert response.status_code < 500 or (path, response.status_code) == ("/ready", 503), response.text
        if response.status_code >= 400 and path != "/ready":
            error = response.json()["error"]
            assert sorted(error) == ["code", "message", "param", "type"]
        elif not path.endswith(NO_JSON):
            json.loads(response.text)

    fuzz()
    for job in list(server.service.jobs.values()):
        server.service.scheduler.stop(job, "canceled")
