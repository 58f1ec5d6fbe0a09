"""The trunk's forward with a memory around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from mnemic.host.call import aside
from mnemic.host.wrappers import MEMORY_NAME, misplaced


class Guard:
    """Stands in place of a trunk's `forward` and hands a call to the router, which plans it and runs it.

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
                    vars(trunk)[name] = guard.forward

    @property
    def forward(self) -> Callable[..., Any]:
        """The trunk's own."""
        return self.inner or type(self.trunk).forward.__get__(self.trunk)

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the forward behind it."""
        return inspect.signature(self.forward)

    @aside
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A call of the trunk."""
        router: Any = self.trunk._modules[MEMORY_NAME]
        if not hasattr(type(router), "run"):
            raise misplaced(router)
        return router.run(self.trunk, self.forward, args, kwargs)
