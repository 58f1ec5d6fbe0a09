"""`mnemic serve`: what clients of the API see, and what their sessions have heard."""

from __future__ import annotations

import json
import threading

import openai
import pytest

import mnemic
from serving import TOKENIZER, model_of, serving

GREEDY = {"temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def service(model, tmp_path_factory):
    with mnemic.SessionStore(tmp_path_factory.mktemp("serve") / "m.db") as store, serving(model, store) as found:
        yield found


def user(text):
    return {"role": "user", "content": text}


def say(client, *messages, **more):
    return client.chat.completions.create(model="tiny", messages=list(messages), **GREEDY | more)


def alone(model, *turns, **ways):
    """What a session says by itself, turn after turn, and the session."""
    session = mnemic.Session(model, TOKENIZER)
    said = [session.chat(turn, **{"max_new_tokens": 6, "do_sample": False} | ways) for turn in turns]
    return said, session


# --- completions -----------------------------------------------------------------------------------------------------


def test_without_a_session_a_request_is_stateless(service, model):
    client = service.openai()
    (expected,), session = alone(model, [user("who?")])
    for _ in range(2):
        answer = say(client, user("who?"))
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].finish_reason == "length"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (session.stream.seen[0] - 8, 6)
    assert [each.id for each in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    ids = TOKENIZER("abc", add_special_tokens=False)["input_ids"]
    text = mnemic.Session(model, TOKENIZER).generate("abc", max_new_tokens=5, do_sample=False)
    raw = mnemic.Session(model, TOKENIZER).generate([ids], max_new_tokens=5, do_sample=False)
    completed = client.completions.create(model="tiny", prompt="abc", temperature=0, max_tokens=5)
    assert completed.choices[0].text == text
    completed = client.completions.create(model="tiny", prompt=ids, temperature=0, max_tokens=5)
    assert completed.choices[0].text == TOKENIZER.decode(raw[0], skip_special_tokens=True)


@pytest.mark.parametrize(("stream", "resends"), [(False, True), (True, False)])
def test_a_session_goes_on_whether_its_client_resends_the_history_or_not(service, model, stream, resends):
    client = service.openai(**{"X-Session-Id": f"s-{stream}-{resends}"})
    expected, session = alone(
        model, [{"role": "system", "content": "be kind"}, user("who?")], [user("where?")], [user("when?")]
    )
    history = [{"role": "system", "content": "be kind"}]
    for turn, text in enumerate(["who?", "where?", "when?"]):
        history.append(user(text))
        sent = history if resends or not turn else [user(text)]
        if stream:
            chunks = list(say(client, *sent, stream=True, stream_options={"include_usage": True}))
            answer = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert chunks[-1].usage.completion_tokens == 6
            assert chunks[-2].choices[0].finish_reason == "length"
            assert chunks[-2].session == {"id": f"s-{stream}-{resends}", "version": turn + 1}
        else:
            answer = say(client, *sent).choices[0].message.content
        assert answer == expected[turn]
        history.append({"role": "assistant", "content": f" {answer}\n"})
    kept = service.parts.sessions.store.get(f"local/session/s-{stream}-{resends}", model, TOKENIZER)
    assert kept.stored.version == 3
    assert kept.stream.seen == session.stream.seen


def test_a_session_is_named_by_header_metadata_or_user(service):
    client, ways = service.openai(), ({"user": "ann"}, {"metadata": {"session": "ann"}})
    versions = [say(client, user("a"), **way).session["version"] for way in ways]
    versions.append(say(client, user("a"), extra_headers={"X-Session-Id": "ann"}, user="bob").session["version"])
    text = client.completions.create(model="tiny", prompt="a", user="ann", temperature=0, max_tokens=2)
    assert [*versions, text.session["version"]] == [1, 2, 3, 4]
    with pytest.raises(openai.BadRequestError, match="a session is named by"):
        say(client, user("a"), extra_headers={"X-Session-Id": "a/b"})


def test_another_history_is_refused_and_nothing_is_read(service, model):
    client = service.openai(**{"X-Session-Id": "edited"})
    said = say(client, user("who?")).choices[0].message.content
    for answer in (said + "!", "x"):
        with pytest.raises(openai.ConflictError, match="not the one that the session has heard"):
            say(client, user("who?"), {"role": "assistant", "content": answer}, user("more"))
    with pytest.raises(openai.BadRequestError, match="heard all of these"):
        say(client, user("who?"), {"role": "assistant", "content": said})
    assert service.parts.sessions.store.entry("local/session/edited").version == 1


def test_a_seed_draws_the_same_and_nobody_else_s_draws_have_a_part(service):
    client, ways = service.openai(), {"temperature": 1.5, "max_tokens": 12}
    first = say(client, user("a"), seed=3, **ways).choices[0].message.content
    others = [threading.Thread(target=say, args=(client, user("b")), kwargs=ways) for _ in range(3)]
    for each in others:
        each.start()
    again = [say(client, user("a"), seed=seed, **ways).choices[0].message.content for seed in (3, 4)]
    for each in others:
        each.join()
    assert again[0] == first != again[1]


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(service):
    client = service.openai()
    whole = say(client, user("who?"), max_tokens=12).choices[0].message.content
    stop = whole[4:6]
    cut = say(client, user("who?"), max_tokens=12, stop=[stop, "\x00"])
    assert cut.choices[0].message.content == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    pieces = say(client, user("who?"), max_tokens=12, stop=stop, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert text == whole[: whole.index(stop)]


def test_penalties_keep_what_was_said_from_being_said_again(service):
    said = say(service.openai(), user("who?"), max_tokens=12, presence_penalty=2, frequency_penalty=2)
    assert len(set(said.choices[0].message.content)) >= 10


# --- raw -------------------------------------------------------------------------------------------------------------


def test_raw_requests(service):
    with service.http() as client:
        body = {"model": "tiny", "messages": [user("who?")], "stream": True, **GREEDY}
        response = client.post("/v1/chat/completions", json=body, headers={"X-Request-Id": "mine-1"})
        lines = [line for line in response.text.split("\n") if line]
        assert response.headers["X-Request-Id"] == "mine-1"
        assert response.headers["content-type"].startswith("text/event-stream")
        assert lines[-1] == "data: [DONE]"
        assert all(json.loads(line.removeprefix("data: "))["object"] for line in lines[:-1])
        for path, status in {"/healthz": 200, "/readyz": 200, "/nothing": 404, "/v1/chat/completions": 405}.items():
            response = client.get(path)
            assert response.status_code == status
            assert len(response.headers["X-Request-Id"]) == 32
        assert client.get("/nothing").json()["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"model": "gpt-4o"}, 404, "model_not_found", "model"),
        ({"messages": []}, 400, "invalid_value", "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, "invalid_value", "messages.0.role"),
        ({"tools": [{"type": "function"}]}, 400, "invalid_value", "tools"),
        ({"temperature": 3}, 400, "invalid_value", "temperature"),
        ({"n": 2}, 400, "invalid_value", "n"),
        ({"max_tokens": 5000}, 400, "too_many_tokens", None),
        ({"unheard_of": 1}, 400, "unknown_parameter", "unheard_of"),
        ({"user": "a b"}, 400, "invalid_value", "user"),
    ],
)
def test_what_cannot_be_done_is_said(service, change, status, code, param):
    with service.http() as client:
        response = client.post("/v1/chat/completions", json={"model": "tiny", "messages": [user("a")]} | change)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), error
