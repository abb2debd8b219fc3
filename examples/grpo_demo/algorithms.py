"""The methods that `--algorithm` accepts: those that need only rewards and log-probabilities.

This demonstration has no reference model and no critic. Methods that need one are left out, and GRPO runs without its
KL penalty.
"""

from typing import Any

from tokfuse import algorithms

# label -> (method, options that differ from the published ones)
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {"kl": None}),
    # GRPO with an entropy bonus that is active only below a target entropy, with Skywork-OR1's controller.
    "grpo_entropy": ("grpo", {"kl": None, "entropy_control": algorithms.EntropyControl()}),
    "dr_grpo": ("dr_grpo", {}),  # make_algorithm sets max_length to --max-new-tokens
    "dapo": ("dapo", {"overlong": None}),
    "rloo": ("rloo", {}),
    "opo": ("opo", {}),
    "gpg": ("gpg", {}),
    "cispo": ("cispo", {}),
    "sapo": ("sapo", {}),
    "gspo": ("gspo", {}),
    "gmpo": ("gmpo", {}),
    "gbpo": ("gbpo", {}),
    "nft": ("nft", {}),
    "adora": ("adora", {}),
    "r2vpo": ("r2vpo", {"delta": 0.05, "step_size": 1.0, "penalty": 0.04}),
    "d3s": ("d3s", {"rollouts": (4, 8), "tokens": (0.5, 1.0), "total_steps": 100}),
}


def make_algorithm(label: str, max_new_tokens: int) -> algorithms.Standard:
    """Return the method with that label. The error for an unknown label lists the known ones."""
    if label not in OPTIONS:
        raise SystemExit(f"train_grpo: --algorithm must be one of {', '.join(OPTIONS)}; got {label!r}.")
    name, options = OPTIONS[label]
    length = {"max_length": max_new_tokens} if name == "dr_grpo" else {}
    method: algorithms.Standard = algorithms.make(name, **options, **length)
    return method
