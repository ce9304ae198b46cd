"""A log Z that was computed once, and when it is no longer right."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_ebm._binding import modules_of, referenced
from pyro_ebm._guard import is_tracing, refuse


class Known:
    """A log Z that was computed once, in the place of a method, and what it was computed for."""

    gradient = "none"

    def __init__(self, d: Any, log_z: Any, value: str) -> None:
        self.parts, self.value = log_z, value
        self.leaves = _leaves(d)
        self.versions = [_version(leaf) for _, leaf in self.leaves]
        self.beta, self.modules = d.beta, list(modules_of(d.energy).values())

    def check_unchanged(self, beta: Any) -> None:
        """Refuse to be the log Z of parameters that have been written to, or replaced, since."""
        if not is_tracing() and (names := self._changed(beta)):
            refuse(f"{', '.join(names)} has changed since", "the density", known=True)

    def _changed(self, beta: Any) -> list[str]:
        pairs = zip(self.leaves, self.versions, strict=True)
        changed = [repr(name) for (name, leaf), was in pairs if _version(leaf) != was]
        if not isinstance(beta, Tensor) and beta != self.beta:
            changed.append("'beta'")
        known = {id(leaf) for _, leaf in self.leaves}
        now = [pair for module in self.modules for pair in module.named_parameters()]
        return changed + [repr(name) for name, leaf in now if id(leaf) not in known]

    def log_z(self, d: Any, x: Tensor | None = None) -> Tensor:
        """Return log Z, without gradients."""
        return self.parts.value

    def __call__(self, d: Any) -> Any:
        """Return log Z with its error."""
        return self.parts

    # Copies of tensors count their versions anew.
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.versions = [_version(leaf) for _, leaf in self.leaves]


def _leaves(d: Any) -> list[tuple[str, Tensor]]:
    """Name the tensors that log Z depends on: beta, and those of the energy and of the base."""
    found: list[tuple[str, Any]] = [("beta", d.beta), *referenced(d.energy), *referenced(d.base)]
    for module in modules_of(d.energy).values():
        found += module.named_parameters()
    return [(name, leaf) for name, leaf in found if isinstance(leaf, Tensor)]


def _version(leaf: Tensor) -> int:
    return 0 if leaf.is_inference() else leaf._version
