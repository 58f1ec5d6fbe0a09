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
    forward, which moves inputs) is called inside. Who wrapped it in something of theirs still calls it when its memory
    is gone: then it is what it stands for.
    """

    def __init__(self, trunk: nn.Module, inner: Callable[..., Any] | None) -> None:
        self.trunk, self.inner = trunk, inner

    @staticmethod
    def install(trunk: nn.Module) -> Guard:
        """Puts one in place."""
        guard = vars(trunk)["forward"] = Guard(trunk, vars(trunk).get("forward"))
        return guard

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
        router: Any = self.trunk._modules.get(MEMORY_NAME)
        if router is not None and not hasattr(type(router), "run"):
            raise misplaced(router)
        if router is None or router.guard is not self:
            return self.forward(*args, **kwargs)
        return router.run(self.trunk, self.forward, args, kwargs)
