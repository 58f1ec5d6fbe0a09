"""The trunk's forward, watched for what torch's hooks do not see."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from mnemic.host.wrappers import MEMORY_NAME


class Guard:
    """Stands in place of a trunk's `forward`, and lets the router take back a call that is left by something other than
    an `Exception`: Ctrl-C, a signal handler's `SystemExit`. Torch calls hooks after an `Exception` alone.

    It belongs to the instance, so a copied or unpickled trunk has its own. Whatever stood there before (accelerate's
    forward, which moves inputs) is called inside.
    """

    def __init__(self, trunk: nn.Module, inner: Callable[..., Any] | None) -> None:
        self.trunk, self.inner = trunk, inner

    @staticmethod
    def install(trunk: nn.Module) -> None:
        """Puts one in place."""
        vars(trunk)["forward"] = Guard(trunk, vars(trunk).get("forward"))

    @staticmethod
    def remove(trunk: nn.Module) -> None:
        """Puts back what stood there, also where accelerate has wrapped it since."""
        for name in ("forward", "_old_forward"):
            guard = vars(trunk).get(name)
            if isinstance(guard, Guard):
                del vars(trunk)[name]
                if guard.inner is not None:
                    vars(trunk)[name] = guard.inner
                elif name != "forward":
                    vars(trunk)[name] = type(trunk).forward.__get__(trunk)

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the forward behind it."""
        return inspect.signature(self.inner or type(self.trunk).forward.__get__(self.trunk))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The trunk's own forward."""
        router: Any = self.trunk._modules[MEMORY_NAME]
        calls = router.calls  # none where somebody goes round the hooks
        with router.undone_when_interrupted(calls[-1]) if calls else contextlib.nullcontext():
            if self.inner is not None:
                return self.inner(*args, **kwargs)
            return type(self.trunk).forward(self.trunk, *args, **kwargs)
