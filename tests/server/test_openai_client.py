"""The official client against the server: answers, streams, choices, errors. The ChecksumModel's text is known."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest
from server.support import MODEL

from bros_ref.model.checksum import next_token
from bros_ref.model.tokenizer import ByteTokenizer

HELLO = [{"role": "user", "content": "hello"}]


def expected(prompt: list[int], num_tokens: int) -> str:
    """The text that the model gives, computed without engine or cache."""
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(next_token(token_ids))
    return ByteTokenizer().decode(token_ids[len(prompt):])


@pytest.mark.parametrize("tier", [None, "auto", "default", "priority", "fast", "flex"])
def test_chat(client, tier):
    given = {} if tier is None else {"service_tier": tier}
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=24, temperature=0, **given)
    assert answer.choices[0].message.content == expected(ByteTokenizer().chat("hello"), 24)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (6, 24, 30)
    assert answer.service_tier == {"priority": "priority", "fast": "priority", "flex": "flex"}.get(tier, "default")


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_is_the_whole_answer_in_pieces(client, include_usage):
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=40, temperature=0, stream=True,
                                                 **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == expected(ByteTokenizer().chat("hello"), 40)
    assert sum(choice.delta.content is not None and choice.delta.role is None
               for chunk in chunks for choice in chunk.choices) == 40  # a chunk for each token, with text or without
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == ["length"]
    if include_usage:
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == 40
        assert all(chunk.usage is None for chunk in chunks[:-1])
    else:
        assert all(chunk.choices for chunk in chunks)


def test_a_stream_ends_with_done(server):
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=30) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = "".join(answer.iter_text()).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


def test_completions_of_several_prompts_with_several_choices(client):
    answer = client.completions.create(model=MODEL, prompt=["one", "two"], n=2, max_tokens=9, temperature=0, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [expected(list(text.encode()), 9) for text in ("one", "two")]
    assert [choice.text for choice in answer.choices] == [texts[0], texts[0], texts[1], texts[1]]
    assert all(len(choice.logprobs.token_logprobs) == 9 for choice in answer.choices)
    assert answer.usage.prompt_tokens == 6


def test_token_ids_as_prompt(client):
    for prompt in ([5, 6, 7], [[5, 6, 7]]):
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=12, temperature=0)
        assert answer.choices[0].text == expected([5, 6, 7], 12)


def test_stop_ends_before_the_stop_string(client):
    whole = expected(ByteTokenizer().chat("hello"), 60)
    stop = whole[4:6]
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=60, temperature=0, stop=[stop])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == whole[:whole.index(stop)]


def test_logprobs_of_a_chat(client):
    for stream in (False, True):
        answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5, temperature=0, logprobs=True,
                                                top_logprobs=3, stream=stream)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
        assert len(entries) == 5
        assert all(entry.logprob == entry.top_logprobs[0].logprob and len(entry.top_logprobs) == 3 for entry in entries)


def test_the_same_seed_gives_the_same_text(client):
    def ask(seed):
        answer = client.completions.create(model=MODEL, prompt="x", max_tokens=30, temperature=1, seed=seed)
        return answer.choices[0].text
    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(5)}) > 1


def test_choices_of_one_call_differ(client):
    answer = client.completions.create(model=MODEL, prompt="x", max_tokens=30, temperature=1, seed=1, n=4)
    assert len({choice.text for choice in answer.choices}) > 1


def test_a_penalty_forbids_what_was_said(client):
    """One token at temperature 0 again and again: a presence penalty of 2 takes the model's certainty (1.0) away."""
    prompt = next([seed] for seed in range(400) if _repeats([seed]))
    plain = client.completions.create(model=MODEL, prompt=prompt, max_tokens=40, temperature=0, logprobs=0)
    other = client.completions.create(model=MODEL, prompt=prompt, max_tokens=40, temperature=0, logprobs=0,
                                      presence_penalty=2)
    assert plain.choices[0].logprobs.token_logprobs != other.choices[0].logprobs.token_logprobs


def _repeats(prompt: list[int]) -> bool:
    token_ids = list(prompt)
    for _ in range(40):
        token_ids.append(next_token(token_ids))
    return len(set(token_ids[1:])) < 40


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_many_at_once_with_the_async_client(server):
    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            return await asyncio.gather(*(
                client.completions.create(model=MODEL, prompt=f"q{i}", max_tokens=8, temperature=0,
                                          extra_body={"service_tier": "flex" if i % 2 else "default"})
                for i in range(24)))

    for i, answer in enumerate(asyncio.run(ask_all())):
        assert answer.choices[0].text == expected(list(f"q{i}".encode()), 8)


@pytest.mark.parametrize(("changes", "param"), [
    ({"temperature": -1}, "temperature"), ({"temperature": float("nan")}, None), ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": "5"}, "max_tokens"), ({"n": 17}, "n"), ({"n": True}, "n"),
    ({"stop": ["a"] * 5}, None), ({"tools": []}, "tools"), ({"logit_bias": {"1": 2}}, "logit_bias"),
    ({"response_format": {"type": "json_object"}}, "response_format.type"), ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"), ({"top_logprobs": 3}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"), ({"best": 1}, "best"),
    ({"max_tokens": 10**6}, "max_tokens"), ({"slo": {"ttft_s": -1, "tpot_s": 1}}, "slo.ttft_s"),
    ({"service_tier": "flex", "slo": {"ttft_s": 1, "tpot_s": 1}}, "slo"), ({"service_tier": "scale"}, "service_tier"),
])
def test_what_the_client_can_mend_is_a_400_that_names_it(server, changes, param):
    import json

    body = {"model": MODEL, "messages": HELLO, "max_tokens": 2} | changes
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=json.dumps(body),
                        headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert param is None or error["param"].startswith(param)


def test_harmless_fields_are_accepted(client):
    client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2, user="me", store=False,
                                   metadata={"a": "b"}, frequency_penalty=0)


def test_own_targets_by_header(server):
    url, body = f"{server.url}/v1/chat/completions", {"model": MODEL, "messages": HELLO, "max_tokens": 2}
    for headers, status in (({"x-slo-ttft-ms": "500"}, 200), ({"x-slo-tpot-ms": "50", "x-slo-ttft-ms": "9"}, 200),
                            ({"x-slo-ttft-ms": "fast"}, 400), ({"x-slo-tpot-ms": "-1"}, 400),
                            ({"x-slo-tpot-ms": "nan"}, 400)):
        assert httpx.post(url, json=body, headers=headers).status_code == status
