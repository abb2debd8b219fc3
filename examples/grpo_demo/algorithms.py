"""What `--algorithm` knows: the methods that need rewards and log-probabilities alone.

This demonstration has no reference model and no critic, so methods that need one are not offered,
and GRPO runs without its penalty.
"""

from typing import Any

from tokfuse import algorithms

# name -> what differs from the method's published options
OPTIONS: dict[str, dict[str, Any]] = {
    "grpo": {"kl": None},
    "dr_grpo": {},  # max_length is --max-new-tokens
    "dapo": {"overlong": None},
    "rloo": {},
    "opo": {},
    "gpg": {},
    "cispo": {},
    "sapo": {},
    "gspo": {},
    "gmpo": {},
    "gbpo": {},
    "nft": {},
    "adora": {},
    "r2vpo": {"delta": 0.05, "step_size": 1.0, "penalty": 0.04},
    "d3s": {"rollouts": (4, 8), "tokens": (0.5, 1.0), "total_steps": 100},
}


def make_algorithm(name: str, max_new_tokens: int) -> algorithms.Standard:
    """The method of that name; an unknown name lists the known."""
    if name not in OPTIONS:
        raise SystemExit(
            f"train_grpo: --algorithm must be one of {', '.join(OPTIONS)}; got {name!r}."
        )
    length = {"max_length": max_new_tokens} if name == "dr_grpo" else {}
    method: algorithms.Standard = algorithms.make(name, **OPTIONS[name], **length)
    return method
