"""schemathesis asks everything that the server's own document allows, and what it does not: no answer is a 5xx."""

import pytest
from serving import served

pytest.importorskip("fastapi")
pytest.importorskip("schemathesis", reason="schemathesis is not installed")

from lrface import load_embedder
from lrface.gallery import Gallery
from lrface.serve.app import build_app
from lrface.serve.limits import Limits


@pytest.fixture(scope="module")
def server(pooled_model, faces, tmp_path_factory):
    embedder = load_embedder(pooled_model)
    gallery = Gallery.create(tmp_path_factory.mktemp("people") / "gallery", embedder)
    gallery.add({"Anna": [faces[0]]}, kind="crop")
    app = build_app(embedder, Limits(), gallery=gallery, page=True, no_reconstruction="no decoder")
    with served(app) as client:
        yield client


@pytest.mark.parametrize("examples", [8, pytest.param(300, marks=pytest.mark.slow, id="long")])
def test_no_question_of_the_document_is_answered_5xx(server, examples):
    import schemathesis
    from hypothesis import HealthCheck, given, seed, settings
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    schema.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
    checks = [
        not_a_server_error,
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    ]
    asked: dict[str, set[int]] = {}
    operations = [each.ok() for each in schema.get_all_operations()]
    for operation in operations:

        @seed(1)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=False,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def ask(case):
            answer = case.call()
            asked.setdefault(case.operation.path, set()).add(answer.status_code)
            case.validate_response(answer, checks=checks)

        ask()
    assert set(asked) == {
        "/about", "/compare", "/embed", "/health", "/health/live", "/metrics", "/page/compare", "/search"
    }  # fmt: skip
    assert asked["/health"] == {200} and asked["/embed"] & {413, 415, 422}
