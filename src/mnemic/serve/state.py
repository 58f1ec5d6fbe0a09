"""What routes share, and whose a request is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Request

from mnemic.serve.engine import Engine
from mnemic.serve.errors import Refused
from mnemic.serve.keys import Keys
from mnemic.serve.metrics import Metrics
from mnemic.serve.schemas import SESSION, Sampling
from mnemic.serve.sessions import Sessions
from mnemic.serve.settings import Settings
from mnemic.serve.turn import Turns


@dataclass
class Server:
    """One app's parts."""

    settings: Settings
    keys: Keys
    metrics: Metrics
    engine: Engine
    sessions: Sessions
    turns: Turns
    began: int

    def check_model(self, name: str) -> None:
        """Raises `Refused` for another model than the one that is served."""
        if name != self.settings.model:
            raise Refused(404, "model_not_found", f"this server has the model {self.settings.model!r} alone", "model")


def server_of(request: Request) -> Server:
    """The app's parts."""
    return request.app.state.server


TheServer = Annotated[Server, Depends(server_of)]


def tenant_of(request: Request, server: TheServer, authorization: Annotated[str | None, Header()] = None) -> str:
    """Whose a request is."""
    tenant = server.keys.tenant(authorization)
    if tenant is None:
        raise Refused(401, "invalid_api_key", "send a key of this server: Authorization: Bearer ...")
    request.scope["mnemic.tenant"] = tenant
    return tenant


Tenant = Annotated[str, Depends(tenant_of)]
Named = Annotated[str | None, Header(alias="X-Session-Id")]
Key = Annotated[str | None, Header(alias="Idempotency-Key")]


def stored(tenant: str, kind: str, name: str) -> str:
    """The name in the store: a tenant's own, which no other can say."""
    return f"{tenant}/{kind}/{name}"


def session_of(header: str | None, asked: Sampling) -> str | None:
    """The session that a request names: in its header, in `metadata.session`, or as `user`; None for none."""
    for place, name in (("X-Session-Id", header), ("metadata.session", (asked.metadata or {}).get("session"))):
        if name is not None:
            return checked(name, place)
    return asked.user


def checked(name: str, place: str) -> str:
    """A session's name; raises `Refused` for what is none."""
    if not re.fullmatch(SESSION, name):
        raise Refused(400, "invalid_session", "a session is named by 1 to 200 of A-Z a-z 0-9 . _ : @ + = ~ -", place)
    return name
