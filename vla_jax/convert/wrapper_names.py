"""Names of tensors of wrapped PyTorch modules, such as those that torch.compile returns."""

import re
from collections.abc import Mapping
from typing import Any

# Names of the inner module in torch.compile, FullyShardedDataParallel, checkpoint_wrapper; they
# begin with "_", so no module of a user has them by chance.
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def unwrap(tensors: Mapping[str, Any], path: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns tensors under the names that they have without wrappers.

    Args:
      tensors: name in a file -> tensor.
      path: of the file, for the error message.

    Returns:
      Name without wrappers -> tensor, in the same order; and such a name -> name in the file, for
      the names that differ.

    Raises:
      ValueError: two names become equal.
    """
    found: dict[str, Any] = {}
    wrapped: dict[str, str] = {}
    for name, tensor in tensors.items():
        inner = _WRAPPERS.sub("", name)
        if inner in found:
            raise ValueError(
                f"{path} must hold every tensor once, got {wrapped.get(inner, inner)} and {name}; "
                "remove one of them."
            )
        found[inner] = tensor
        if inner != name:
            wrapped[inner] = name
    return found, wrapped
