"""Requests drawn from the server's own OpenAPI schema, right ones and wrong ones: it keeps what the schema says."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from inform_rm.serving.app import Limits, create_app

TOKEN = "schema-token"
CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


_SETTINGS = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
OPERATIONS = [
    ("POST", "/score"),
    ("POST", "/get_reward"),
    ("POST", "/classify"),
    ("GET", "/health"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def schema_of(scorer):
    """The schema of an application; schemathesis reads it over the application itself."""
    apps = []

    def load(token=None):
        apps.append(create_app(scorer, Limits(max_rows=8), token))
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return schemathesis.openapi.from_asgi("/openapi.json", apps[-1], headers=headers)

    yield load
    for app in apps:
        app.state.batcher.close()


def call(schema, method, path, mode, max_examples, checks, **keywords):
    cases = []

    @hypothesis_settings(max_examples=max_examples, **_SETTINGS)
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def calls(case):
        cases.append(case)
        case.call_and_validate(checks=checks, **keywords)

    calls()
    assert cases


@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.name)
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_answers_are_as_the_schema_says(schema_of, method, path, mode):
    if method == "GET" and mode == GenerationMode.NEGATIVE:
        pytest.skip("nothing to get wrong")
    call(schema_of(), method, path, mode, 10, CHECKS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_the_schema_says_what_needs_the_token(schema_of, method, path):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    call(schema_of(TOKEN), method, path, GenerationMode.POSITIVE, 3, [*CHECKS, ignored_auth], headers=headers)
