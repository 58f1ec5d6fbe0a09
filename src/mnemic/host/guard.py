"""The forward of a trunk, and of the model around it, with a memory around them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from mnemic.host.call import aside
from mnemic.host.wrappers import MEMORY_NAME, misplaced


class Guard:
    """Stands in place of a module's `forward` and hands a call to the router of its trunk, which plans it and runs it.
    The module is the trunk, or the model whose head comes after it.

    It belongs to the instance, so a copied or unpickled module has its own. Whatever stood there before (accelerate's
    forward, which moves inputs) is called inside. Who wrapped it in something of theirs still calls it when its memory
    is gone: then it is what it stands for.
    """

    def __init__(self, module: nn.Module, trunk: nn.Module, inner: Callable[..., Any] | None) -> None:
        self.module, self.trunk, self.inner = module, trunk, inner

    @staticmethod
    def install(module: nn.Module, trunk: nn.Module) -> Guard:
        """Puts one in place."""
        guard = vars(module)["forward"] = Guard(module, trunk, vars(module).get("forward"))
        return guard

    @staticmethod
    def remove(module: nn.Module) -> None:
        """Puts back what stood there, also where accelerate has wrapped it since."""
        for name in ("forward", "_old_forward"):
            guard = vars(module).get(name)
            if isinstance(guard, Guard):
                del vars(module)[name]
                if guard.inner is not None:
                    vars(module)[name] = guard.inner
                elif name != "forward":
                    vars(module)[name] = guard.forward

    @property
    def forward(self) -> Callable[..., Any]:
        """The module's own."""
        return self.inner or type(self.module).forward.__get__(self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the forward behind it."""
        return inspect.signature(self.forward)

    @aside
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A call of the module."""
        router: Any = self.trunk._modules.get(MEMORY_NAME)
        if router is not None and not hasattr(type(router), "run"):
            raise misplaced(router)
        if router is None or self not in router.guards:
            return self.forward(*args, **kwargs)
        run = router.run if self.module is self.trunk else router.run_whole
        return run(self.module, self.forward, args, kwargs)
