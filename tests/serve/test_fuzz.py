"""Requests that nobody thought of: those that /openapi.json allows, and those that it forbids."""

import fake_engine
import pytest
import schemathesis
import serving
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from jaxtp.serve.server import application
from jaxtp.serve.settings import Settings

LIMITS = {"max_n": 8, "max_prompts": 8, "max_body_bytes": 100_000}
DESCRIBED = application(serving.served(fake_engine.FakeEngine(None)), Settings(**LIMITS)).openapi()
OPERATIONS = [found.ok() for found in schemathesis.openapi.from_dict(DESCRIBED).get_all_operations()]
ASKING = [operation for operation in OPERATIONS if operation.method == "post"]
RIGHT = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "tokens": [5]}
FEW = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[*HealthCheck],
)


@pytest.fixture(scope="module")
def server():
    engine = fake_engine.FakeEngine(serving.tokenizer(), max_model_len=64)
    with serving.serving(serving.served(engine), **LIMITS) as running:
        yield running
    assert not engine.running
    assert not engine.waiting


def named(operation):
    return operation.label


@pytest.mark.parametrize("operation", [each for each in OPERATIONS if each not in ASKING], ids=named)
def test_what_is_read_has_the_shape_that_is_told(server, operation):
    @FEW
    @given(case=operation.as_strategy())
    def answered(case):
        case.call_and_validate(base_url=server.url)

    answered()


@pytest.mark.parametrize("operation", ASKING, ids=named)
def test_what_the_schema_forbids_is_refused_as_it_tells(server, operation):
    @FEW
    @given(case=operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def answered(case):
        case.call_and_validate(base_url=server.url)

    answered()


@pytest.mark.parametrize("operation", ASKING, ids=named)
def test_what_is_refused_is_named_and_what_is_left_is_taken(server, operation):
    """A schema cannot tell what the model's vocabulary and context allow; the answer does."""

    @FEW
    @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
    def answered(case):
        while True:
            answer = case.call_and_validate(base_url=server.url, excluded_checks=[positive_data_acceptance])
            if answer.status_code == 200:
                break
            name = answer.json()["error"]["param"].split(".")[0]
            assert name in case.body
            if name in RIGHT:
                assert case.body[name] != RIGHT[name]
                case.body[name] = RIGHT[name]
            else:
                del case.body[name]

    answered()
