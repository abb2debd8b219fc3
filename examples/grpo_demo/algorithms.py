"""What `--algorithm` knows: an objective, an advantage, and what the loss is divided by."""

from dataclasses import dataclass

from tokfuse import Objective, PPOClip


@dataclass(frozen=True)
class Algorithm:
    """One row of the table.

    Args:
        objective: the loss of a token, and how tokens add up (`tokfuse.Objective`).
        advantage: `kind` of `tokfuse.group_advantage`.
        divide_by: what the summed loss is divided by: "tokens" that count, "sequences", or
            "budget" (sequences times --max-new-tokens, a constant).
    """

    objective: Objective
    advantage: str
    divide_by: str

    def normalizer(self, sequences: int, tokens: int, max_new_tokens: int) -> float:
        """The number that `divide_by` stands for."""
        counts = {
            "tokens": tokens,
            "sequences": sequences,
            "budget": sequences * max_new_tokens,
        }
        return float(counts[self.divide_by])

    @property
    def needs_every_row(self) -> bool:
        """False when a sequence with advantage 0 has gradient 0, so that it may be left out."""
        return self.objective.kl is not None or self.objective.entropy_coef != 0.0


ALGORITHMS = {
    # DeepSeekMath (arXiv 2402.03300), without its penalty against a reference model.
    "grpo": Algorithm(Objective(aggregation="seq_mean_token_mean"), "grpo", "sequences"),
    # arXiv 2503.20783: no division by the group's deviation nor by the sequence's length.
    "dr_grpo": Algorithm(Objective(aggregation="token_sum"), "dr_grpo", "budget"),
    # arXiv 2503.14476: a wider upper clip, and every token of the batch weighs the same.
    "dapo": Algorithm(
        Objective(shape=PPOClip(low=0.2, high=0.28), aggregation="token_mean"), "grpo", "tokens"
    ),
    # PPO's clipped loss (arXiv 1707.06347) on leave-one-out advantages instead of a critic's.
    "ppo_clip": Algorithm(Objective(aggregation="token_mean"), "rloo", "tokens"),
    # arXiv 2507.18071: one ratio per sequence, clipped in a very narrow band.
    "gspo": Algorithm(
        Objective(
            shape=PPOClip(low=3e-4, high=4e-4), level="sequence", aggregation="seq_mean_token_mean"
        ),
        "grpo",
        "sequences",
    ),
}


def find_algorithm(name: str) -> Algorithm:
    """The algorithm of that name; an unknown name lists the known."""
    if name not in ALGORITHMS:
        raise SystemExit(
            f"train_grpo: --algorithm must be one of {', '.join(ALGORITHMS)}; got {name!r}."
        )
    return ALGORITHMS[name]
