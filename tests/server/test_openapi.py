"""schemathesis over our own OpenAPI page: whatever it sends, no 5xx, and only the answers that the page promises."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from server.support import make_state

from bros_ref.server.app import create_app

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]


def operations() -> dict[str, object]:
    """Every operation of the page but the endless one, by method and path."""
    state, _ = make_state(Path(tempfile.mkdtemp()))
    page = create_app(state).openapi()
    state.store.close()
    found = [result.ok() for result in schemathesis.openapi.from_dict(page).get_all_operations()]
    return {operation.label: operation for operation in found if operation.path != "/dashboard/events"}


OPERATIONS = operations()


def test_every_error_is_json(tmp_path):
    """Also on pages of HTML: a schedule before the first step is such an error."""
    state, _ = make_state(tmp_path)
    page = create_app(state).openapi()
    state.store.close()
    errors = {(path, status): set(response["content"]) for path, operations in page["paths"].items()
              for operation in operations.values() for status, response in operation["responses"].items()
              if int(status) >= 400}
    assert ("/dashboard/schedule", "404") in errors
    assert {place: kinds for place, kinds in errors.items() if kinds != {"application/json"}} == {}


@pytest.mark.parametrize("label", OPERATIONS)
def test_no_input_breaks_the_server(server, label):
    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=OPERATIONS[label].as_strategy())
    def check(case):
        case.call_and_validate(base_url=server.url, checks=CHECKS, timeout=30)

    check()
