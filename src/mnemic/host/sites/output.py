"""What a block puts out: hidden states pass the memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from mnemic.host.passing import passed
from mnemic.host.sites import Hook
from mnemic.host.wrappers import gather_for_gradient

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class Output(Hook):
    """The hook of a block; blocks return a tensor or a tuple that begins with one."""

    def install(self, block: nn.Module) -> RemovableHandle:
        """Registers it, before those of others."""
        return block.register_forward_hook(self.leave, with_kwargs=True, prepend=True)

    def leave(self, block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """The block's output, when its hidden states have passed."""
        hidden_btd, *rest = output if isinstance(output, tuple) else (output,)
        gather_for_gradient(block, hidden_btd)
        hidden_btd = passed(self.router, self.site, hidden_btd)
        return (hidden_btd, *rest) if isinstance(output, tuple) else hidden_btd
