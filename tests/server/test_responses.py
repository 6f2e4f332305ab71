"""`/v1/responses` with the official client: the same text as the chat endpoint gives, whole and as typed events."""

from __future__ import annotations

import openai
import pytest
from server.support import MODEL
from server.test_openai_client import expected

from bros_ref.model.tokenizer import ByteTokenizer


def test_whole_and_in_events(client):
    answer = client.responses.create(model=MODEL, input="hello", max_output_tokens=30, temperature=0)
    assert answer.output_text == expected(ByteTokenizer().chat("hello"), 30)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (6, 30)
    events = list(client.responses.create(model=MODEL, input="hello", max_output_tokens=30, temperature=0, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [events[0].type, events[-1].type] == ["response.created", "response.incomplete"]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == answer.output_text
    assert events[-1].response.output_text == answer.output_text


def test_the_stream_helper_follows(client):
    with client.responses.stream(model=MODEL, input="hello", max_output_tokens=8, temperature=0) as stream:
        kinds = [event.type for event in stream]
    assert kinds[-1] in ("response.completed", "response.incomplete")


def test_instructions_and_history(client):
    first = client.responses.create(model=MODEL, input=[{"role": "user", "content": "a"}], instructions="be kind",
                                    max_output_tokens=5, temperature=0, service_tier="flex")
    assert first.service_tier == "flex"
    assert first.output_text == expected(ByteTokenizer().chat([{"content": "be kind"}, {"content": "a"}]), 5)
    again = client.responses.create(
        model=MODEL, max_output_tokens=5, temperature=0,
        input=[{"role": "user", "content": "a"}, *(item.model_dump(exclude={"phase"}) for item in first.output),
               {"role": "user", "content": [{"type": "input_text", "text": "b"}]}])
    assert again.usage.output_tokens == 5


@pytest.mark.parametrize("given", [{"previous_response_id": "resp_1"}, {"tools": [{"type": "web_search"}]},
                                   {"background": True}, {"reasoning": {"effort": "low"}}])
def test_what_is_not_supported_is_named(client, given):
    with pytest.raises(openai.BadRequestError, match=next(iter(given))):
        client.responses.create(model=MODEL, input="x", **given)
