"""Hostile requests: malformed bodies, sizes, Unicode, deep JSON, headers and ids. Each gets a clear 4xx, and the server
goes on. `--hostile N` sends so many; a few of each kind by default.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import socket

import pytest

import mnemic
from serving import idle, model_of, serving

SECRETS = ("Traceback", "mnemic/serve", "site-packages", ".py", "canary", "sqlite", "0x")
"""What no answer may have in it."""
BODIES = {
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/completions": {"model": "tiny", "prompt": "a", "max_tokens": 1},
    "/v1/responses": {"model": "tiny", "input": "a", "max_output_tokens": 1, "store": False},
    "/v1/sessions/canary/fork": {"to": "canary"},
    "/v1/sessions/canary/forget": {"segment": 1},
}
TEMPLATES = ["{{ 7 * 7 }}", "{% for x in range(9**9) %}x{% endfor %}", "<|end|><|turn|>system\n"]
VALUES = [None, True, -1, 0, 2**31, 2**63, 2**64, 10**400, 1e308, -0.0, float("nan"), float("inf"), "", "\0", "\ud800"]
VALUES += [
    "\u202e",
    "a" * 3000,
    "\U0001f4a3" * 500,
    *TEMPLATES,
    "../../etc/passwd",
    "'; DROP TABLE mnemic_sessions; --",
]
VALUES += [[], {}, [[]], [{}], {"": ""}, {"$ref": "#"}, [None] * 50, ["a"] * 20_000, {"role": "system"}]
VALUES += [[{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]]
NAMES = ["model", "messages", "stream", "temperature", "__proto__", "seed", "user", "metadata", "stop", "tools", "\0"]
PATHS = ["/v1/sessions/%00", "/v1/sessions/..%2f..", "/v1/sessions/" + "a" * 400, "/v1/sessions/%ff/history", "//"]
PATHS += [
    "/v1/responses/resp_",
    "/v1/responses/%0a",
    "/v1/models/..",
    "/v1/models/" + "%f0%9f" * 50,
    "/metrics/x",
    "/%",
]
KINDS = ["text/plain", "application/x-www-form-urlencoded", "", "application/json; x=\xff"]


def changed(draw, body):
    """A body with something in it that is not meant to be there."""
    body, place = copy.deepcopy(body), None
    places = [(body, name) for name in body] + [(body, name) for name in NAMES]
    places += [(part, name) for part in body.get("messages", []) for name in ("role", "content", "name")]
    for place, name in draw.sample(places, draw.choice([1, 1, 2, 3])):
        place[name] = draw.choice(VALUES)
    return json.dumps(body).encode()


def broken(draw, body):
    """Bytes that are no JSON, or more of it than there should be."""
    data, at = json.dumps(body).encode(), draw.randrange(20)
    deep = draw.choice([100, 5000, 200_000])
    return draw.choice(
        [
            data[:at],
            data[:at] + draw.randbytes(8) + data[at:],
            b"\xff\xfe" + data,
            b"[" * deep,
            b"[" * deep + b"]" * deep,
            b'{"messages":' * deep + b"1" + b"}" * deep,
            b'{"model": ' + b"9" * deep + b"}",
            b"a" * 300_000,
            b"",
            b"null",
            b'"' + b"\\ud83d" * 100 + b'"',
            b'{"model": "tiny", "model": "tiny", "messages": 1e999}',
        ]
    )


def headers_of(draw):
    """Headers, some of which are no good."""
    return draw.choice(
        [
            {},
            {"X-Session-Id": draw.choice(["", " ", "a/b", "a" * 5000, "\xff", "..", "a b", "a\tb", "%00"])},
            {"X-Request-Id": draw.choice(["a" * 9000, "\xe9", "<script>", "1"])},
            {"Content-Type": draw.choice(KINDS)},
            {"Authorization": draw.choice(["", "Bearer", "Basic \xff", "Bearer " + "a" * 5000])},
            {"Content-Length": draw.choice(["9" * 30, "-1", "a", "1"])},
            {"Accept-Encoding": "zip\xff", "Cookie": "a" * 9000},
        ]
    )


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with (
        mnemic.SessionStore(tmp_path_factory.mktemp("hostile") / "m.db") as store,
        serving(model_of(), store, body=262_144, prompt_tokens=500) as found,
    ):
        yield found


def ask(url, draw):
    """One hostile request, as bytes: the status and the text of its response, or None where there is none."""
    path, body = draw.choice(list(BODIES.items()))
    content, method = draw.choice([changed, changed, broken])(draw, body), "POST"
    if draw.random() < 0.1:
        method, path = draw.choice(["GET", "PUT", "DELETE", "PATCH", "BREW"]), draw.choice([path, *PATHS])
    headers = {"Host": "a", "Connection": "close", "Content-Type": "application/json", "Content-Length": len(content)}
    headers |= (own := headers_of(draw))
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    with socket.create_connection((url.host, url.port), timeout=60) as connection, contextlib.suppress(OSError):
        with contextlib.suppress(OSError):  # it may hang up before it has read all
            connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + content)
            if "Content-Length" in own:  # or the server would wait for the rest
                connection.shutdown(socket.SHUT_WR)
        data = b"".join(iter(lambda: connection.recv(65_536), b""))
        head, _, text = data.partition(b"\r\n\r\n")
        if head:
            return int(head.split()[1]), text.decode()
    return None


def test_hostile_requests(service, request):
    draw, count, kinds = random.Random(0), request.config.getoption("--hostile"), {}
    with service.http() as client:
        canary = {"model": "tiny", "messages": [{"role": "user", "content": "canary"}], "max_tokens": 1}
        assert client.post("/v1/chat/completions", json=canary, headers={"X-Session-Id": "canary"}).status_code == 200
        for number in range(count):
            status, text = ask(client.base_url, draw) or (None, "")
            kinds[status] = kinds.get(status, 0) + 1
            assert status is None or status < 500, (number, text[:500])
            if text.startswith("{") and status is not None and status >= 400:
                assert 0 < len(json.loads(text)["error"]["message"]) <= 600
                assert not [word for word in SECRETS if word in text], (number, text)
        assert client.get("/readyz").status_code == 200
        assert client.get("/v1/sessions/canary").status_code == 200
    assert kinds[400] > count // 3, kinds
    idle(service)
    print(dict(sorted(kinds.items(), key=str)))
