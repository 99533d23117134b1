"""What a request may be."""

import re

import pytest
from pydantic import ValidationError

from shared.errors import Expiry, JobFailure
from web.schemas.jobs import JobError
from web.schemas.requests import InferenceRequest, JobRequest

TURN = {"role": "user", "content": "hi"}


def faults(**body: object) -> list[tuple[int | str, ...]]:
    with pytest.raises(ValidationError) as caught:
        JobRequest.model_validate(body)
    return [error["loc"] for error in caught.value.errors()]


def test_defaults_leave_to_the_service_what_is_the_services() -> None:
    request = JobRequest.model_validate({"prompt": "hi"})
    assert (request.model, request.max_tokens, request.temperature, request.seed) == (None, None, None, None)
    assert (request.top_p, request.stop, request.priority, request.metadata) == (1.0, [], "normal", {})


@pytest.mark.parametrize(("stop", "means"), [("a", ["a"]), (["a", "b"], ["a", "b"]), ([], [])])
def test_one_stop_is_a_list_of_one(stop: object, means: list[str]) -> None:
    assert JobRequest.model_validate({"prompt": "hi", "stop": stop}).stop == means


def test_many_bad_messages_are_one_error() -> None:
    assert faults(messages=[TURN, *[1] * 1000]) == [("messages", 1)]


def test_a_conversation_has_an_end() -> None:
    assert len(JobRequest.model_validate({"messages": [TURN] * 10_000}).messages or ()) == 10_000
    assert faults(messages=[TURN] * 10_001) == [("messages",)]


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": [TURN]}, {"messages": []}])
def test_exactly_one_of_prompt_and_messages(body: dict[str, object]) -> None:
    assert faults(**body) == [("messages",)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""), ("prompt", 1), ("prompt", "\ud800"), ("max_tokens", 0), ("max_tokens", True),
        ("max_tokens", 1.5), ("temperature", -0.1), ("temperature", float("nan")), ("top_p", 0), ("top_p", 1.1),
        ("top_k", -1), ("min_p", 2), ("repetition_penalty", 0), ("presence_penalty", 3), ("seed", -1),
        ("seed", 2**63), ("stop", ["a"] * 17), ("stop", [""]), ("stop", 1), ("priority", "now"),
        ("start_within_s", 0), ("deadline_s", float("inf")), ("metadata", {str(n): "" for n in range(17)}),
        ("metadata", {"a": None}), ("unknown", 1),
        ("logprobs", -1), ("logprobs", 21), ("logprobs", True), ("logprobs", "3"), ("logprobs", 1.5),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_names_its_field(field: str, value: object) -> None:
    assert {loc[0] for loc in faults(**{"prompt": "hi", field: value})} == {field}


@pytest.mark.parametrize("turn", [{"role": "king", "content": "a"}, {"role": "user"}, {**TURN, "name": "x"}, "hi"])
def test_a_message_is_a_role_and_content(turn: object) -> None:
    assert faults(messages=[TURN, turn])[0][:2] == ("messages", 1)


def test_only_a_leading_system_message_can_be_shared() -> None:
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    assert JobRequest.model_validate({"messages": [system, user], "share_system_prompt": True}).share_system_prompt
    for body in ({"messages": [user, system]}, {"prompt": "Hi"}):
        with pytest.raises(ValidationError, match="system's"):
            JobRequest.model_validate({**body, "share_system_prompt": True})


def test_whole_numbers_are_numbers() -> None:
    assert JobRequest.model_validate({"prompt": "hi", "temperature": 1}).temperature == 1.0


SAME = [
    {"prompt": "hi", "temperature": 1, "metadata": {"a": "1", "b": "2"}, "stop": "x"},
    {"metadata": {"b": "2", "a": "1"}, "stop": ["x"], "prompt": "hi", "temperature": 1.0},
    {"prompt": "hi", "temperature": 1.0, "metadata": {"a": "1", "b": "2"}, "stop": "x", "top_p": 1, "model": None},
]


def test_requests_that_ask_for_the_same_mean_the_same() -> None:
    meanings = {JobRequest.model_validate(body).meaning() for body in SAME}
    assert len(meanings) == 1
    for other in (
        {"prompt": "ho"},
        {"temperature": 0.9},
        {"metadata": {}},
        {"stop": "y"},
        {"seed": 0},
        {"top_p": 0.5},
        {"logprobs": 0},
    ):
        assert JobRequest.model_validate({**SAME[0], **other}).meaning() not in meanings
    turns = [TURN, {**TURN, "content": "ho"}]
    there, back = (JobRequest.model_validate({"messages": each}).meaning() for each in (turns, turns[::-1]))
    assert there != back


def test_what_a_model_has_a_default_for_is_meant_where_it_is_said() -> None:
    def meaning(**more: object) -> str:
        return JobRequest.model_validate({"prompt": "hi", **more}).meaning("id", {"top_p", "temperature"})

    assert meaning(top_p=1.0) != meaning() == meaning(temperature=None) == meaning(top_k=0)
    assert meaning(model="alias") == meaning(model="id") != meaning()


def test_an_inference_request_may_stream() -> None:
    assert InferenceRequest.model_validate({"prompt": "hi", "stream": True}).stream
    assert faults(prompt="hi", stream=True) == [("stream",)]


def test_a_prompt_to_inference_is_a_question_where_the_model_knows_conversations() -> None:
    question = InferenceRequest.model_validate({"prompt": "hi"})
    assert question.conversation(has_template=True) == (TURN,)
    assert question.conversation(has_template=False) is None
    assert InferenceRequest.model_validate({"prompt": "hi", "raw": True}).conversation(has_template=True) is None
    with pytest.raises(ValidationError, match="It needs a prompt"):
        InferenceRequest.model_validate({"messages": [{"role": "user", "content": "hi"}], "raw": True})
    assert JobRequest.model_validate({"prompt": "hi"}).conversation(has_template=True) is None


def test_every_code_that_a_job_can_end_with_is_told() -> None:
    told = re.findall("`(.+?)`", JobError.model_fields["code"].description or "")
    assert sorted(told) == sorted([*JobFailure, *Expiry])
