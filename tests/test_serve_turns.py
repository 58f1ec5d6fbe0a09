"""A turn is kept whole or not at all: cancelled, failed, refused, told to end, or met by another server."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

import mnemic
from mnemic.serve.keys import Keys, new_key
from mnemic.state import StateError
from serving import TOKENIZER, idle, model_of, serving
from test_serve import alone, say, user

FOREVER = {"max_tokens": 4000, "temperature": 0}


@pytest.fixture(scope="module")
def model():
    return model_of(endless=True)


@pytest.fixture
def service(model, file_store):
    with serving(model, file_store, rows=2, queue=1, wait=0.2, body=5000, prompt_tokens=300) as found:
        yield found


def begin(client, text, **more):
    """A long answer, of which the first piece has come."""
    stream = say(client, user(text), stream=True, **FOREVER | more)
    next(stream)
    next(stream)
    return stream


def test_a_client_that_leaves_takes_its_turn_back(service, model):
    client = service.openai(**{"X-Session-Id": "s"})
    expected, _ = alone(model, [user("who?")], [user("where?")])
    assert say(client, user("who?")).choices[0].message.content == expected[0]
    begin(client, "never mind").close()
    idle(service)
    body = {"model": "tiny", "messages": [user("never mind")], "max_tokens": 4000, "temperature": 0}
    with service.http(**{"X-Session-Id": "s"}) as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/chat/completions", json=body, timeout=0.3)
    idle(service)
    assert service.parts.sessions.store.entry("local/session/s").version == 1
    assert say(client, user("where?")).choices[0].message.content == expected[1]


def test_one_request_at_a_time_for_a_session_and_no_more_than_there_is_room_for(service):
    client = service.openai()
    first = begin(client, "a", user="s")
    with pytest.raises(openai.ConflictError, match="another request uses this session") as refused:
        say(client, user("b"), user="s")
    assert refused.value.response.headers["Retry-After"] == "1"
    others = [begin(client, "c", user=name) for name in ("t",)]
    waiting = threading.Thread(target=lambda: say(client, user("d"), user="u"))
    waiting.start()
    while service.parts.turns.running < 3:
        time.sleep(0.01)
    with pytest.raises(openai.RateLimitError) as refused:
        say(client, user("e"))
    assert refused.value.response.headers["Retry-After"] == "1"
    for stream in (first, *others):
        stream.close()
    waiting.join()
    idle(service)
    assert [entry.name for entry in service.parts.sessions.store.list()] == ["local/session/u"]
    assert not service.parts.sessions._locks


def test_requests_of_one_session_wait_for_each_other(model, file_store):
    with serving(model, file_store) as service:
        client = service.openai()
        threads = [threading.Thread(target=say, args=(client, user("a")), kwargs={"user": "s"}) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert file_store.entry("local/session/s").version == 4


def test_a_failure_says_nothing_of_itself(service, model, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("sec" + "ret")

    monkeypatch.setattr(type(model), "forward", broken)
    with pytest.raises(openai.InternalServerError) as failed:
        say(service.openai(), user("a"), user="s")
    assert "secret" not in str(failed.value) + caplog.text
    assert "RuntimeError" in caplog.text
    idle(service)
    assert service.parts.sessions.store.list() == []


def test_a_turn_that_cannot_be_kept_is_not_given_out_as_whole(service, monkeypatch):
    client = service.openai(**{"X-Session-Id": "s"})
    say(client, user("a"))

    def broken(*_, **__):
        raise StateError("a secret place")

    monkeypatch.setattr(service.parts.sessions.store, "put", broken)
    with pytest.raises(openai.InternalServerError) as failed:
        say(client, user("b"))
    assert failed.value.status_code == 503
    with pytest.raises(openai.APIError, match="could not be read or kept"):
        list(say(client, user("b"), stream=True))
    monkeypatch.undo()
    assert say(client, user("b")).session["version"] == 2


def test_two_servers_on_one_store(model, file_store):
    """Each sees what the other kept; of two turns at once the second is refused, and nothing of it is kept."""
    expected, _ = alone(model, *[[user(text)] for text in ("a", "b", "c", "d")])
    with serving(model, file_store) as one, serving(model, file_store) as two:
        clients = [each.openai(**{"X-Session-Id": "s"}) for each in (one, two)]
        for turn, text in enumerate("abc"):
            assert say(clients[turn % 2], user(text)).choices[0].message.content == expected[turn]
        stream = say(clients[0], user("x"), stream=True, max_tokens=40)
        next(stream)
        assert say(clients[1], user("d")).choices[0].message.content == expected[3]
        with pytest.raises(openai.APIError, match="changed by another server"):
            list(stream)
        assert file_store.entry("local/session/s").version == 4


def test_a_request_that_is_sent_again_is_answered_as_it_was_and_read_once(model, file_store):
    with serving(model, file_store) as one, serving(model, file_store) as two:
        keys = [{"Idempotency-Key": key} for key in ("first", "second")]
        client, other = (each.openai(**{"X-Session-Id": "s"}) for each in (one, two))
        answer = say(client, user("who?"), extra_headers=keys[0], max_tokens=9)
        for again in (client, other):  # the other server knows of it, too
            same = say(again, user("who?"), extra_headers=keys[0], max_tokens=9)
            assert (same.choices, same.usage, same.session) == (answer.choices, answer.usage, answer.session)
        chunks = list(say(client, user("who?"), extra_headers=keys[0], max_tokens=9, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert (text, chunks[-1].session["version"]) == (answer.choices[0].message.content, 1)
        with pytest.raises(openai.UnprocessableEntityError, match="another request had this key"):
            say(client, user("what?"), extra_headers=keys[0], max_tokens=9)
        assert say(client, user("who?"), extra_headers=keys[1], max_tokens=9).session["version"] == 2
        assert say(client, user("who?"), max_tokens=9).session["version"] == 3
        assert "request" not in file_store.get("local/session/s", model, TOKENIZER).notes
        text = client.completions.create(model="tiny", prompt="a", extra_headers=keys[0], max_tokens=2)
        same = client.completions.create(model="tiny", prompt="a", extra_headers=keys[0], max_tokens=2)
        assert (same.choices, same.session) == (text.choices, text.session)


def test_limits(service):
    with service.http() as client:
        body = {"model": "tiny", "messages": [user("a" * 400)]}
        error = client.post("/v1/chat/completions", json=body).json()["error"]
        assert error["code"] == "context_length_exceeded"
        for content in (b"a" * 6000, (b"a" * 1000 for _ in range(6))):  # with its length and without
            response = client.post("/v1/chat/completions", content=content)
            assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")


# --- whose -----------------------------------------------------------------------------------------------------------


def test_keys_and_tenants(model, file_store, tmp_path, caplog):
    file = tmp_path / "keys.toml"
    keys = {name: new_key(name, file) for name in ("acme", "beta")}
    assert not any(key in file.read_text() for key in keys.values())
    assert file.stat().st_mode & 0o777 == 0o600
    caplog.set_level("INFO", "mnemic.serve")
    with serving(model, file_store, Keys(file)) as service:
        acme, beta = (service.openai(keys[name], **{"X-Session-Id": "topic"}) for name in keys)
        for key in ("wrong", keys["acme"][:-1]):
            with pytest.raises(openai.AuthenticationError):
                say(service.openai(key), user("a"))
        assert say(acme, user("canary")).session["version"] == 1
        assert say(beta, user("other")).session["version"] == 1
        assert sorted(entry.name for entry in file_store.list()) == ["acme/session/topic", "beta/session/topic"]
        with service.http() as http:
            assert http.get("/v1/models").status_code == 401
            told = http.get("/metrics").text
        assert 'mnemic_turns_total{end="whole"} 2.0' in told
        assert not any(word in told + caplog.text for word in ("canary", "topic"))
        assert "/v1/chat/completions 200" in caplog.text
        assert "acme" not in told


@pytest.mark.parametrize("text", ["", "key = 1", "[[key]]\ntenant = 'A'\nsha256 = 'x'\n", "\xff"])
def test_a_file_that_is_none_of_keys_is_refused(tmp_path, text):
    file = tmp_path / "keys.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="is no file of keys"):
        Keys(file)
    with pytest.raises(ValueError, match="is not named by"):
        new_key("A B", tmp_path / "new.toml")


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_serves_and_ends_when_every_answer_is_kept(tmp_path, model):
    """SIGTERM in the middle of an answer: it goes on to its end, and its turn is in the store."""
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    mnemic.attached(model).save_pretrained(tmp_path / "memory")
    command = [sys.executable, "-c", "from mnemic.cli import app; app()", "serve", str(tmp_path / "model"), "--name"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command += ["tiny", "--memory", str(tmp_path / "memory"), "--store", str(tmp_path / "m.db"), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
        until = time.monotonic() + 300
        while True:
            try:
                assert client.get("/readyz").status_code == 200
                break
            except httpx.ConnectError:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < until
                time.sleep(0.1)
        body = {"model": "tiny", "messages": [user("who?")], "temperature": 0, "max_tokens": 60, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body | {"user": "s"}) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["session"]["version"] == 1
        process.wait(120)
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
    with mnemic.SessionStore(tmp_path / "m.db") as store:
        assert store.entry("local/session/s").version == 1
        (expected,), session = alone(model, [user("who?")], max_new_tokens=60)
        assert store.get("local/session/s", model, TOKENIZER).stream.seen == session.stream.seen
    assert expected == "".join(
        json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content", "") for line in rest[:-1]
    )
