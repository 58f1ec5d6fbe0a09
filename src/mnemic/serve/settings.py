"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Limits and names. Sizes in bytes, times in seconds.

    `model`: the name that clients ask for. `rows`: answers that share forward passes. `queue`: requests that wait
    beside these; one more gets 429. `wait`: how long a request waits for another one of its session before it gets 409.
    `timeout`: how long an answer may take. `prompt_tokens`, `new_tokens`: most of a request and of its answer.
    `body`: most of a request. `warm`: sessions that stay in RAM. `keep_text`: new sessions keep their text.
    """

    model: str
    rows: int = 8
    queue: int = 64
    wait: float = 30.0
    timeout: float = 600.0
    prompt_tokens: int = 131_072
    new_tokens: int = 4096
    body: int = 4 * 2**20
    warm: int = 64
    keep_text: bool = False

    def __post_init__(self) -> None:
        """Raises `ValueError` for a limit that nothing could pass."""
        for name in ("rows", "prompt_tokens", "new_tokens", "body"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 or more")
        for name in ("queue", "wait", "warm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use 0 or more")
        if self.timeout <= 0:
            raise ValueError(f"timeout is {self.timeout}; use more than 0 seconds")
