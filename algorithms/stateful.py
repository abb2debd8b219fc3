"""What every method with a memory shares: a frozen configuration, a state of plain data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokfuse.runtime.core.errors import refuse

State = dict[str, Any]
"""Numbers, strings, lists, dicts and tensors: `torch.save` and JSON-like stores keep it exactly."""


@dataclass(frozen=True, kw_only=True)
class Stateful:
    """Methods take a state and return the next one; nothing is changed in place.

    `name` is its name in the registry, for messages and checkpoints.
    """

    name: str = ""

    @property
    def _op(self) -> str:
        """What its messages start with."""
        return f"algorithms.{self.name or type(self).__name__.lower()}"

    def initial_state(self) -> State:
        """The state before the first batch."""
        return {}

    def state_dict(self, state: State) -> State:
        """A checkpoint: the state, and whose it is."""
        return {"algorithm": self.name, "config": repr(self), "state": state}

    def load_state_dict(self, saved: Mapping[str, Any]) -> State:
        """The state of a checkpoint; refuses that of another method or configuration."""
        for key, own in (("algorithm", self.name), ("config", repr(self))):
            if saved[key] != own:
                raise refuse(
                    f"algorithms.{self.name}",
                    f"the {key} of the checkpoint",
                    own,
                    saved[key],
                    "Make the algorithm that was saved.",
                )
        state: State = saved["state"]
        if state.keys() != self.initial_state().keys():
            raise refuse(
                f"algorithms.{self.name}",
                "the saved state",
                f"of {sorted(self.initial_state())}",
                sorted(state),
                "Load what state_dict returned.",
            )
        return state


def draws(seed: int, step: int) -> np.random.Generator:
    """The random numbers of one step: a state that holds the step resumes them exactly."""
    return np.random.default_rng([seed, step])
