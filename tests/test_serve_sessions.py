"""`/v1/sessions` and `/v1/responses`: what is kept, forked, forgotten and removed, and that nobody sees another's."""

from __future__ import annotations

import openai
import pytest

import mnemic
from mnemic.serve.keys import Keys, new_key
from serving import TOKENIZER, model_of, serving
from test_serve import alone, say, user


@pytest.fixture(scope="module")
def model():
    return model_of("recall-0", window=16)


@pytest.fixture(scope="module")
def service(model, tmp_path_factory):
    with mnemic.SessionStore(tmp_path_factory.mktemp("serve") / "m.db") as store, serving(model, store) as found:
        yield found


def respond(client, text, **more):
    return client.responses.create(
        model="tiny", input=text, **{"temperature": 0, "max_output_tokens": 6, **more}, extra_headers={}
    )


def test_a_session_is_shown_forked_exported_and_deleted(service, model, tmp_path):
    client = service.openai(**{"X-Session-Id": "ann"})
    say(client, user("who?"))
    with service.http() as http:
        shown = http.get("/v1/sessions/ann").json()
        kept = service.parts.sessions.store.get("local/session/ann", model, TOKENIZER)
        assert (shown["version"], shown["tokens"], shown["memory"]) == (1, kept.stream.seen[0], "recall")
        assert http.get("/v1/sessions/ann/history").json()["data"] == kept.history
        (tmp_path / "a").write_bytes(http.get("/v1/sessions/ann/export").content)
        loaded = mnemic.Session.load(tmp_path / "a", model, TOKENIZER)
        assert (loaded.history, loaded.notes) == (kept.history, kept.notes)
        assert http.post("/v1/sessions/ann/fork", json={"to": "bob"}).json()["version"] == 1
        again = http.post("/v1/sessions/ann/fork", json={"to": "bob"})
        assert (again.status_code, again.json()["error"]["code"]) == (409, "exists")
        expected = kept.chat([user("where?")], max_new_tokens=6, do_sample=False)
        bob = service.openai(**{"X-Session-Id": "bob"})
        assert say(bob, user("where?")).choices[0].message.content == expected
        assert http.delete("/v1/sessions/ann").json()["deleted"] is True
        for path in ("", "/history", "/export"):
            assert http.get(f"/v1/sessions/ann{path}").status_code == 404
        assert http.delete("/v1/sessions/ann").status_code == 404
        assert http.get("/v1/sessions/bob").json()["version"] == 2
    assert say(client, user("who?")).session["version"] == 1


def test_tokens_are_forgotten_by_place_segment_and_time(service, model):
    client = service.openai(**{"X-Session-Id": "forgetful"})
    say(client, user("the key is in the old house by the sea"))
    with service.http() as http:

        def forget(**what):
            return http.post("/v1/sessions/forgetful/forget", json=what)

        history = http.get("/v1/sessions/forgetful/history").json()["data"]
        assert forget(first=10, last=12).json()["forgotten_tokens"] == 3
        done = forget(segment=history[2]["number"]).json()
        assert (done["forgotten_tokens"], done["version"]) == (8, 3)
        for what in ({"segment": 9999}, {"first": 0, "last": 10**6}, {"since": 0}, {"since": 1, "until": 2}):
            assert forget(**what).status_code == 400  # some of these are in the window, or nowhere
        for what in ({}, {"first": 1}, {"segment": 1, "since": 0}):
            assert forget(**what).json()["error"]["code"] == "invalid_value"
        assert http.get("/v1/sessions/forgetful").json()["version"] == 3
        assert forget(segment=history[2]["number"]).json()["forgotten_tokens"] == 0  # they are gone


def test_responses_go_on_from_the_one_before_and_branch(service, model):
    client = service.openai()
    turns = [[{"role": "system", "content": "be kind"}, user("who?")], [user("where?")], [user("when?")]]
    expected, _ = alone(model, *turns)
    first = respond(client, "who?", instructions="be kind")
    assert (first.output_text, first.status) == (expected[0], "incomplete")
    second = respond(client, [user("where?")], previous_response_id=first.id, instructions="be kind")
    assert second.output_text == expected[1]
    for _ in range(2):  # from the second, twice
        with respond(client, "when?", previous_response_id=second.id, stream=True) as events:
            kinds, text, last = [], "", None
            for each in events:
                kinds.append(each.type)
                text += each.delta if each.type == "response.output_text.delta" else ""
                last = each
        assert text == last.response.output_text == expected[2]
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.incomplete"
    other, _ = alone(model, turns[0], [user("why?")])
    branch = respond(client, "why?", previous_response_id=first.id, store=False)
    assert branch.output_text == other[1]
    with pytest.raises(openai.NotFoundError):
        respond(client, "and?", previous_response_id=branch.id)
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        respond(client, "and?", previous_response_id=first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(first.id)
    assert respond(client, "when?", previous_response_id=second.id).output_text == expected[2]


def test_what_is_another_s_is_as_if_it_were_not_there(model, file_store, tmp_path):
    """The same answer to the letter, but for the request's id, on every route."""
    keys = {name: new_key(name, tmp_path / "keys.toml") for name in ("acme", "beta")}
    with serving(model, file_store, Keys(tmp_path / "keys.toml")) as service:
        acme = service.openai(keys["acme"])
        say(acme, user("a"), user="s")
        response = respond(acme, "a").id
        with service.http(Authorization=f"Bearer {keys['beta']}") as beta:
            for name in ("s", "nobody"):
                found = [beta.get(f"/v1/sessions/{name}{path}") for path in ("", "/history", "/export")]
                found += [beta.delete(f"/v1/sessions/{name}")]
                found += [beta.post(f"/v1/sessions/{name}/fork", json={"to": "t"})]
                found += [beta.post(f"/v1/sessions/{name}/forget", json={"segment": 1})]
                for each in (response, "resp_" + "0" * 32):
                    body = {"model": "tiny", "input": "a", "previous_response_id": each}
                    found += [beta.post("/v1/responses", json=body), beta.delete(f"/v1/responses/{each}")]
                for each in found:
                    assert (each.status_code, each.json()["error"]["message"]) == (404, "there is no such session")
        assert len(file_store.list()) == 2
