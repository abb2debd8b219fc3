"""Base class of every method with a state: a frozen configuration, and a state of plain data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokfuse.runtime.core.errors import refuse

State = dict[str, Any]
"""Numbers, strings, lists, dicts and tensors, which `torch.save` and JSON-like stores preserve exactly."""


@dataclass(frozen=True, kw_only=True)
class Stateful:
    """A method whose functions take a state and return the next one. Nothing is changed in place.

    `name` is the name in the registry. Messages and checkpoints contain it.
    """

    name: str = ""

    @property
    def _op(self) -> str:
        """Prefix of the error messages."""
        return f"algorithms.{self.name or type(self).__name__.lower()}"

    def initial_state(self) -> State:
        """Return the state before the first batch."""
        return {}

    def state_dict(self, state: State) -> State:
        """Return a checkpoint: the state, and the method and configuration that it belongs to."""
        return {"algorithm": self.name, "config": repr(self), "state": state}

    def load_state_dict(self, saved: Mapping[str, Any]) -> State:
        """Return the state of a checkpoint. Raise an error if another method or configuration saved it."""
        for key, own in (("algorithm", self.name), ("config", repr(self))):
            if saved[key] != own:
                raise refuse(
                    f"algorithms.{self.name}",
                    f"the {key} of the checkpoint",
                    own,
                    saved[key],
                    "Make the algorithm with the saved configuration.",
                )
        state: State = saved["state"]
        if state.keys() != self.initial_state().keys():
            raise refuse(
                f"algorithms.{self.name}",
                "the saved state",
                f"one with the keys {sorted(self.initial_state())}",
                sorted(state),
                "Pass what state_dict returned.",
            )
        return state


def draws(seed: int, step: int) -> np.random.Generator:
    """Return the random generator of one step. A state that holds the step resumes it exactly."""
    return np.random.default_rng([seed, step])
