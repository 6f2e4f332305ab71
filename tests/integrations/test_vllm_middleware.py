"""`service_tier` and headers become `vllm_xargs`; runs without vLLM, on an application that repeats what it got."""

import json

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from bros_ref.integrations.vllm.middleware import PATHS, RequestClassMiddleware


async def repeat(request: Request) -> Response:
    body = await request.body()
    assert int(request.headers.get("content-length", len(body))) == len(body)
    return Response(body)


@pytest.fixture(scope="module")
def client():
    routes = [Route(path, repeat, methods=["POST", "GET"]) for path in (*PATHS, "/other")]
    with TestClient(RequestClassMiddleware(Starlette(routes=routes))) as client:
        yield client


@pytest.mark.parametrize(("body", "headers", "arguments"), [
    ({}, {}, {"bros_class": "rt"}),
    ({"service_tier": None}, {}, {"bros_class": "rt"}),
    ({"service_tier": "flex"}, {}, {"bros_class": "be"}),
    ({"service_tier": "fast"}, {"X-SLO-TTFT-MS": "250"}, {"bros_class": "rt", "ttft_slo_s": 0.25}),
    ({}, {"x-slo-ttft-ms": "250", "x-slo-tpot-ms": "50.5"},
     {"bros_class": "rt", "ttft_slo_s": 0.25, "tpot_slo_s": 0.0505}),
    ({"service_tier": "flex", "vllm_xargs": {"bros_class": "rt"}}, {}, {"bros_class": "rt"}),  # the body's own words
    ({"vllm_xargs": {"ttft_slo_s": 1}}, {"x-slo-tpot-ms": "9"}, {"ttft_slo_s": 1}),
    ({"vllm_xargs": {"session_id": "x"}}, {}, {"bros_class": "rt", "session_id": "x"}),
    ({"prompt": "ü" * 5000}, {}, {"bros_class": "rt"}),
])
@pytest.mark.parametrize("path", PATHS)
def test_class_and_targets_are_passed_on(client, path, body, headers, arguments):
    answer = client.post(path, json=body, headers=headers)
    assert answer.status_code == 200
    assert answer.json() == {**body, "vllm_xargs": arguments}


@pytest.mark.parametrize(("body", "headers", "message"), [
    ({"service_tier": "cheap"}, {}, "service_tier must be one of"), ({"service_tier": 3}, {}, "service_tier"),
    ({}, {"x-slo-ttft-ms": "soon"}, "x-slo-ttft-ms must be a number"), ({}, {"x-slo-ttft-ms": "-1"}, "positive"),
    ({"service_tier": "flex"}, {"x-slo-ttft-ms": "9"}, "best-effort request has no targets"),
    ({"vllm_xargs": {"bros_class": "x"}}, {}, "bros_class must be"), ({"vllm_xargs": [1]}, {}, "vllm_xargs must be"),
])
def test_arguments_that_make_no_sense_are_answered_with_400(client, body, headers, message):
    answer = client.post(PATHS[0], json=body, headers=headers)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"\xff", json.dumps("text").encode()])
def test_what_is_no_json_object_is_left_to_vllm(client, raw):
    assert client.post(PATHS[0], content=raw).content == raw


def test_other_requests_pass_unchanged(client):
    assert client.post("/other", json={"service_tier": "cheap"}).json() == {"service_tier": "cheap"}
    assert client.get(PATHS[0]).status_code == 200
