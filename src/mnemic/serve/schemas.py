"""What requests may say. A parameter that is not here is refused, so nothing is left out in silence."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SESSION = r"[A-Za-z0-9._:@+=~-]{1,200}"
"""What a session's name is made of."""
SessionId = Annotated[str, Field(pattern=f"^{SESSION}$")]


class Body(BaseModel):
    """A JSON object without anything else in it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Part(Body):
    """A piece of a message: text."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class Message(Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None
    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None
    refusal: None = None

    def plain(self) -> dict[str, str]:
        """As templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Sampling(Body):
    """How an answer is made. What is not said is as the model's generation config says."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool = False
    user: SessionId | None = None
    metadata: dict[str, str] | None = None
    # what is no part of an answer here, and does no harm
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None

    @field_validator("metadata")
    @classmethod
    def _few(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if value is not None and (len(value) > 16 or any(len(k) > 64 or len(v) > 512 for k, v in value.items())):
            raise ValueError("metadata has at most 16 entries, names of 64 and values of 512 characters")
        return value

    @property
    def most(self) -> int | None:
        """Tokens of the answer at most."""
        return None


class StreamOptions(Body):
    """What a stream tells beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Old(Sampling):
    """What both older endpoints take."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Format(Body):
    """The form of an answer: text."""

    type: Literal["text"]


class ChatRequest(Old):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None
    store: bool | None = None
    response_format: Format | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None

    @property
    def most(self) -> int | None:
        """Tokens of the answer at most."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Old):
    """`/v1/completions`: a text, or the ids of its tokens."""

    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None

    @property
    def most(self) -> int | None:
        """Tokens of the answer at most; 16 as ever where nobody says."""
        return self.max_tokens or 16


class TextFormat(Body):
    """The form of a response: text."""

    format: Format | None = None


class ResponseRequest(Sampling):
    """`/v1/responses`: what is new, and the response that it goes on from."""

    input: Annotated[str, Field(min_length=1)] | Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    instructions: str | None = None
    previous_response_id: Annotated[str, Field(pattern=r"^resp_[0-9a-f]{32}$")] | None = None
    store: bool = True
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    text: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    background: Literal[False] | None = None
    include: Annotated[list[str], Field(max_length=0)] | None = None

    @property
    def most(self) -> int | None:
        """Tokens of the answer at most."""
        return self.max_output_tokens

    @property
    def messages(self) -> list[Message]:
        """The input as messages, with the instructions before it."""
        said = [Message(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        return [*([Message(role="system", content=self.instructions)] if self.instructions else []), *said]


class ForkRequest(Body):
    """`/v1/sessions/{id}/fork`: the new session's name."""

    to: SessionId


class ForgetRequest(Body):
    """`/v1/sessions/{id}/forget`: tokens `first` to `last`, a `segment` by its number in the history, or those whose
    segments were written from `since` to `until` (seconds since 1970).
    """

    first: Annotated[int, Field(ge=0)] | None = None
    last: Annotated[int, Field(ge=0)] | None = None
    segment: Annotated[int, Field(ge=1)] | None = None
    since: float | None = None
    until: float | None = None

    @model_validator(mode="after")
    def _one_way(self) -> ForgetRequest:
        ways = ("first", "last"), ("segment",), ("since", "until")
        given = [way for way in ways if any(getattr(self, name) is not None for name in way)]
        if len(given) != 1 or ((self.first is None) is not (self.last is None)):
            raise ValueError("say what is to be forgotten by first and last, by segment, or by since and until")
        return self
