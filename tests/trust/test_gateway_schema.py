"""The gateway held against its description in OpenAPI: requests that fit it, and requests that do
not, get answers that fit it, and never an error of its own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import hypothesis
import pytest
from figures import Figure
from gateway_schema import SCHEMA
from gateway_tools import Site, site
from hypothesis import HealthCheck
from seeds import new_seed

FEW, MANY = 6, 50
OPERATIONS = [(path, method) for path, item in SCHEMA["paths"].items() for method in item]
operations = pytest.mark.parametrize(
    ("path", "method"), OPERATIONS, ids=[f"{method} {path}" for path, method in OPERATIONS]
)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("described")) as made:
        made.upstream("chat")
        made.upstream("broken", "--status", 500)
        made.gateway()
        yield made


@cache
def described() -> Any:
    """The description; schemathesis takes half a second to load, which no other worker needs."""
    import schemathesis

    return schemathesis.openapi.from_dict(SCHEMA)


def hold(here: Site, operation: Any, count: int, seed: int | None = None) -> None:
    """Send so many requests for an operation. Raises what an answer is wrong in."""
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [
        *(not_a_server_error, status_code_conformance, content_type_conformance),
        response_schema_conformance,
    ]

    def check(case: Any) -> None:
        case.call_and_validate(base_url=here.url, checks=checks, timeout=60)

    test = hypothesis.given(operation.as_strategy())(check)
    if seed is not None:
        test = hypothesis.seed(seed)(test)
    hypothesis.settings(
        max_examples=count,
        derandomize=seed is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )(test)()


@operations
def test_answers_are_as_described(here: Site, path: str, method: str) -> None:
    hold(here, described()[path][method.upper()], FEW)
    assert "Traceback" not in here.output()


@pytest.mark.trust
@operations
def test_many_answers_are_as_described(here: Site, path: str, method: str, figure: Figure) -> None:
    hold(here, described()[path][method.upper()], MANY, new_seed())
    assert "Traceback" not in here.output()
    figure("requests held against the description", MANY)


def test_an_answer_that_is_not_as_described_is_noticed(here: Site) -> None:
    """A server's error passes through the gateway, and the description has none."""
    import schemathesis

    broken = {"type": "object", "properties": {"model": {"const": "broken"}}, "required": ["model"]}
    body = {"content": {"application/json": {"schema": broken}}, "required": True}
    item = {"post": {"requestBody": body, "responses": {"200": {"description": "done"}}}}
    wrong = schemathesis.openapi.from_dict({**SCHEMA, "paths": {"/tokenize": item}})
    with pytest.raises(schemathesis.core.failures.FailureGroup, match="Server error"):
        hold(here, wrong["/tokenize"]["POST"], FEW)
