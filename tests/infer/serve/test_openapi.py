"""The OpenAPI document: it has the endpoints that there are and the fields that they read, and whatever schemathesis
makes of it is answered as it says."""

from __future__ import annotations

import collections

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from starlette.routing import Route

from omni_jax.infer.batch import openai
from omni_jax.infer.serve import chat, speech, transcribe
from omni_jax.infer.serve.app import Endpoints
from tests.infer.serve.conftest import NAME

EXAMPLES = 20
load_all_checks()
KEPT = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
CHECK = CHECKS.get_by_names(KEPT)


@pytest.fixture(scope="module")
def document(http):
    return http.get("/openapi.json").json()


@pytest.fixture(scope="module")
def made(document):
    return schemathesis.openapi.from_dict(document)


def body(document, path):
    (content,) = document["paths"][path]["post"]["requestBody"]["content"].values()
    return {**content["schema"], "components": document["components"]}


def test_endpoints_and_fields(document, replica, made):
    made.validate()
    routes = {r.path.replace(":path", ""): r for r in Endpoints(replica).routes() if isinstance(r, Route)}
    assert set(document["paths"]) == set(routes) - {"/", "/openapi.json"}
    for path, operations in document["paths"].items():
        assert {method.upper() for method in operations} == routes[path].methods - {"HEAD"}
    fields = {*openai.SETTINGS, *openai.NEUTRAL, *openai.OTHERS, *chat.OTHERS}
    assert set(body(document, "/v1/chat/completions")["properties"]) == fields
    assert set(body(document, "/v1/audio/speech")["properties"]) == set(speech.FIELDS)
    assert set(body(document, "/v1/audio/transcriptions")["properties"]) == set(transcribe.FIELDS)


@pytest.mark.parametrize(
    ("path", "field", "good", "bad"),
    [
        ("/v1/chat/completions", "temperature", 0.5, -1),
        ("/v1/chat/completions", "top_p", 1, 0),
        ("/v1/chat/completions", "max_tokens", 3, 0),
        ("/v1/chat/completions", "stop", ["."], [""]),
        ("/v1/chat/completions", "n", 1, 2),
        ("/v1/chat/completions", "modalities", ["text", "audio"], ["audio"]),
        ("/v1/chat/completions", "media", {"max_pixels": 4000}, {"private_urls": True}),
        ("/v1/audio/speech", "response_format", "opus", "midi"),
        ("/v1/audio/speech", "voice", {"id": "Chelsie"}, "Nobody"),
        ("/v1/audio/speech", "input", "Hello", " "),
    ],
)
def test_the_document_says_what_the_server_says(http, document, path, field, good, bad):
    """A value passes the schema where the server takes it, and nowhere else."""
    base = {
        "model": NAME,
        **({"input": "Hi"} if "speech" in path else {"messages": [{"role": "user", "content": "A"}]}),
    }
    check = jsonschema.Draft202012Validator(body(document, path))
    for value, status in ((good, 200), (bad, 400)):
        given = {**base, field: value}
        assert check.is_valid(given) == (status == 200)
        assert http.post(path, json=given).status_code == status


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", ["chat/completions", "audio/speech", "audio/transcriptions"])
def test_requests_of_the_document(url, made, path, mode):
    """Right and wrong ones: no failure of the server, and each answer has the form that the document gives it."""
    found = collections.Counter()

    @given(case=made[f"/v1/{path}"]["POST"].as_strategy(generation_mode=mode))
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    def ask(case):
        if isinstance(case.body, dict) and "messages" in case.body:
            case.body |= {"max_completion_tokens": 2, "max_tokens": 2}  # long replies would take the time
        answer = case.call(base_url=url, timeout=60)
        case.validate_response(answer, checks=CHECK)
        found[answer.status_code] += 1

    ask()
    assert set(found) <= {200, 400, 404, 415}
    assert found[200] or mode is GenerationMode.NEGATIVE or "transcriptions" in path  # random bytes are no recording


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", f"/v1/models/{NAME}"])
def test_answers_without_a_body(url, made, path):
    operation = made[path.replace(f"/{NAME}", "/{name}")]["GET"]
    case = operation.Case(path_parameters={"name": NAME} if NAME in path else {})
    answer = case.call(base_url=url)
    assert answer.status_code == 200
    case.validate_response(answer, checks=CHECK)
