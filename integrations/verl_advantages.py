"""verl's advantage estimators on tokfuse's one-pass operations: the same numbers without a Python loop.

The signatures are those that verl's trainer calls: padded (batch, length) tensors, and groups given by the array of
prompt uids. All functions are module-level, so Ray can send them by name.
"""

from typing import Any

import numpy as np
import torch

from tokfuse.algorithms import advantages as estimators
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.ops.gae import gae as gae_op
from tokfuse.runtime.ops.group_advantage import group_advantage
from tokfuse.runtime.ops.influence import squared_gradient_norm
from tokfuse.runtime.ops.whiten import whiten

Pair = tuple[torch.Tensor, torch.Tensor]


def _borders(x: torch.Tensor) -> torch.Tensor:
    rows, length = x.shape
    return torch.arange(rows + 1, dtype=torch.int32, device=x.device) * length


def _groups(index: Any, device: torch.device) -> torch.Tensor:
    """Return group ids, (batch,) int64, from verl's uids: strings or numbers in a numpy array, or a tensor."""
    values = index.detach().cpu().numpy() if isinstance(index, torch.Tensor) else np.asarray(index)
    return torch.from_numpy(np.unique(values, return_inverse=True)[1].reshape(-1)).to(device)


def _needs(name: str, argument: str, value: Any) -> Any:
    if value is None:
        raise refuse(
            f"tokfuse_{name}",
            argument,
            f"given (verl's trainer passes it only to its own {name!r})",
            None,
            "Use verl's own estimator of that name.",
        )
    return value


def _scaled(config: Any, norm_adv_by_std_in_grpo: bool | None) -> bool:
    if norm_adv_by_std_in_grpo is not None:
        return norm_adv_by_std_in_grpo
    return True if config is None else bool(config.get("norm_adv_by_std_in_grpo", True))


def group(
    kind: str,
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Any,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool | None = None,
    config: Any = None,
    **_: Any,
) -> Pair:
    """Return advantages that compare the responses to one prompt; `kind` is a preset of `tokfuse.group_advantage`."""
    scores = token_level_rewards.sum(-1)
    ids = _groups(index, scores.device)
    options: dict[str, Any] = {}
    if kind in ("grpo", "pass_at_k"):
        if _scaled(config, norm_adv_by_std_in_grpo):
            options["eps"] = epsilon
        else:
            options["scale"] = "none"
    if kind == "opo":
        options["lengths"] = response_mask.sum(-1).long()
    if kind == "pass_at_k" and bool((ids.bincount() < 2).any()):
        raise refuse(
            "tokfuse_grpo_passk", "index", "groups of at least 2 responses", "a group of 1", "Sample more per prompt."
        )
    out = group_advantage(scores, ids, kind, **options).unsqueeze(-1) * response_mask
    return out, out


def gdpo(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Any,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
    non_tensor_batch: Any = None,
    batch: Any = None,
    **_: Any,
) -> Pair:
    """Return the weighted sum of the GRPO advantages of every reward, whitened over the batch (arXiv 2601.05242).

    The rewards are the columns config.gdpo_reward_keys of non_tensor_batch, with the weights
    config.gdpo_reward_weights (None: 1). Without keys there is one reward, the sum of token_level_rewards. As in verl,
    config.norm_adv_by_std_in_grpo has no effect here.
    """
    keys: Any = None if config is None else config.get("gdpo_reward_keys", None)
    rewards = [token_level_rewards.sum(-1)]
    if keys or (config is not None and non_tensor_batch is not None and batch is not None):
        columns = _needs("gdpo", "non_tensor_batch", non_tensor_batch)
        for key in _needs_keys(keys):
            if key not in columns:
                known = ", ".join(map(str, columns))
                raise refuse("tokfuse_gdpo", "gdpo_reward_keys", f"columns of the batch ({known})", key, "Check them.")
        values = [np.asarray(columns[key], dtype=np.float32) for key in keys]
        rewards = [torch.from_numpy(x).to(token_level_rewards.device) for x in values]
    given: Any = None if config is None or not keys else config.get("gdpo_reward_weights", None)
    weights = [1.0] * len(rewards) if given is None else list(given)
    if len(weights) != len(rewards):
        raise refuse(
            "tokfuse_gdpo", "gdpo_reward_weights", f"{len(rewards)} numbers, one per key", len(weights), "Check them."
        )
    ids = _groups(index, token_level_rewards.device)
    options: dict[str, Any] = {"eps": epsilon} if norm_adv_by_std_in_grpo else {"scale": "none"}
    parts = [w * group_advantage(r, ids, "grpo", **options) for w, r in zip(weights, rewards, strict=True)]
    total = torch.stack(parts).sum(0).unsqueeze(-1) * response_mask
    out = _whitened(total, response_mask) * response_mask
    return out, out


def _needs_keys(keys: Any) -> Any:
    if not keys:
        raise refuse(
            "tokfuse_gdpo",
            "config.gdpo_reward_keys",
            "the names of the rewards that compute_score returns",
            keys,
            "Set algorithm.gdpo_reward_keys.",
        )
    return keys


def gpg(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: Any, f_norm: float = 1.0, **_: Any
) -> Pair:
    """Return (R - mean) batch / #(R != 0) / f_norm."""
    scores = token_level_rewards.sum(-1)
    gain = group_advantage(scores, _groups(index, scores.device), "dr_grpo")
    some = torch.count_nonzero(scores).clamp(min=1)
    out = (gain * (scores.shape[0] / some) / f_norm).unsqueeze(-1) * response_mask
    return out, out


def _whitened(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return whiten(x.reshape(-1), mask.reshape(-1) > 0).view_as(x)


def reinforce_plus_plus_baseline(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: Any, **_: Any
) -> Pair:
    """Return R - mean of the group on every token, whitened over the batch."""
    scores = token_level_rewards.sum(-1)
    gain = group_advantage(scores, _groups(index, scores.device), "dr_grpo")
    out = _whitened(gain.unsqueeze(-1).expand_as(token_level_rewards), response_mask)
    return out, out


def reinforce_plus_plus(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, config: Any = None, **_: Any
) -> Pair:
    """Return the discounted reward to go, whitened over the batch."""
    gamma = _needs("reinforce_plus_plus", "config", config).gamma
    mask = response_mask.reshape(-1) > 0
    flat = token_level_rewards.reshape(-1)
    borders = _borders(token_level_rewards)
    # Without a value function the advantage is the reward to go. Masked tokens are skipped.
    returns = gae_op(flat, torch.zeros_like(flat), borders, gamma=gamma, mask=mask)[0]
    returns = returns.view_as(token_level_rewards)
    return _whitened(returns, response_mask), returns


def gae(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    values: torch.Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
    **_: Any,
) -> Pair:
    """Return generalised advantages, whitened, and returns. Tokens outside the mask are skipped and get 0."""
    v = _needs("gae", "values", values)
    mask = response_mask.reshape(-1) > 0
    advantage, returns = gae_op(
        token_level_rewards.reshape(-1), v.reshape(-1), _borders(v), gamma=float(gamma), lam=float(lam), mask=mask
    )
    return whiten(advantage, mask).view_as(v), returns.view_as(v)


def remax(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    reward_baselines: torch.Tensor | None = None,
    **_: Any,
) -> Pair:
    """Return the reward to go minus the reward of the greedy response."""
    greedy = _needs("remax", "reward_baselines", reward_baselines)
    returns = (token_level_rewards * response_mask).flip(-1).cumsum(-1).flip(-1)
    return returns - greedy.unsqueeze(-1) * response_mask, returns


def optimal_token_baseline(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Any,
    old_log_probs: torch.Tensor | None = None,
    sum_pi_squared: torch.Tensor | None = None,
    rollout_is_weights: torch.Tensor | None = None,
    handle_zero_tail: bool = True,
    **_: Any,
) -> Pair:
    """Return the returns minus a baseline per position, weighted by the running sum of 1 - 2 p + sum of p^2.

    The squares of rollout_is_weights, (batch, length), multiply the steps of this sum. handle_zero_tail: no baseline at
    positions that only one response of a group reaches.
    """
    energy = _energy("optimal_token_baseline", old_log_probs, sum_pi_squared, rollout_is_weights)
    returns = _to_go(token_level_rewards, response_mask)
    gain = _less_baseline(returns, energy, response_mask, _groups(index, returns.device), handle_zero_tail)
    return gain * response_mask, returns


def tir_optimal_token_baseline(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Any,
    old_log_probs: torch.Tensor | None = None,
    sum_pi_squared: torch.Tensor | None = None,
    rollout_is_weights: torch.Tensor | None = None,
    handle_zero_tail: bool = True,
    **_: Any,
) -> Pair:
    """Return the same with positions that count only the tokens of the policy: for several turns and tools.

    Responses of a group are then compared at their n-th own token. A response without one is not part of its group.
    """
    energy = _energy("tir_optimal_token_baseline", old_log_probs, sum_pi_squared, rollout_is_weights)
    returns = _to_go(token_level_rewards, response_mask)
    own = response_mask > 0
    kept = own.any(1)
    # Stable: the policy's tokens come first, in their order.
    order = (~own).to(torch.uint8).argsort(dim=1, stable=True)
    gain = torch.zeros_like(returns)
    part = _less_baseline(
        returns.gather(1, order)[kept],
        energy.gather(1, order)[kept],
        response_mask.gather(1, order)[kept],
        _groups(index, returns.device)[kept],
        handle_zero_tail,
    )
    gain[kept] = torch.zeros_like(part).scatter(1, order[kept], part)
    return gain * response_mask, returns


def _energy(
    name: str, old: torch.Tensor | None, square: torch.Tensor | None, weights: torch.Tensor | None
) -> torch.Tensor:
    """Return 1 - 2 p + sum of p^2 of every token, times the squared importance weights."""
    old, square = _needs(name, "old_log_probs", old), _needs(name, "sum_pi_squared", square)
    assert old is not None and square is not None
    energy = squared_gradient_norm(old.double(), square.double())
    return energy if weights is None else energy * weights.double().square()


def _to_go(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (rewards * mask).flip(-1).cumsum(-1).flip(-1)


def _less_baseline(
    returns: torch.Tensor, energy: torch.Tensor, mask: torch.Tensor, ids: torch.Tensor, zero_tail: bool
) -> torch.Tensor:
    valid = mask.reshape(-1) > 0
    gain = estimators.token_baseline_advantage(returns.reshape(-1), energy.reshape(-1), _borders(returns), ids, valid)
    gain = gain.view_as(returns).to(returns.dtype)
    if zero_tail and len(ids):
        gain = torch.where(_beyond_the_second(mask, ids), returns, gain)
    return gain


def _beyond_the_second(mask: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the positions that only the longest response of a group reaches, (batch, length) bool."""
    tokens = mask.sum(-1).long()
    longest = torch.zeros(int(ids.max()) + 1, dtype=torch.int64, device=mask.device)
    longest.scatter_reduce_(0, ids, tokens, "amax")
    is_longest = tokens == longest[ids]
    single = torch.zeros_like(longest).index_add_(0, ids, is_longest.long()) == 1
    second = torch.zeros_like(longest).scatter_reduce_(0, ids, torch.where(is_longest, 0, tokens), "amax")
    position = torch.arange(mask.shape[1], device=mask.device)
    return (is_longest & single[ids]).unsqueeze(-1) & (position >= second[ids].unsqueeze(-1))


# name without prefix -> (function, its first argument if it implements several estimators)
ESTIMATORS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "grpo": (group, ("grpo",)),
    "dr_grpo": (group, ("dr_grpo",)),
    "rloo": (group, ("rloo",)),
    "opo": (group, ("opo",)),
    "grpo_passk": (group, ("pass_at_k",)),
    "maxrl": (group, ("maxrl",)),
    "gpg": (gpg, ()),
    "reinforce_plus_plus": (reinforce_plus_plus, ()),
    "reinforce_plus_plus_baseline": (reinforce_plus_plus_baseline, ()),
    "gae": (gae, ()),
    "remax": (remax, ()),
    "gdpo": (gdpo, ()),
    "optimal_token_baseline": (optimal_token_baseline, ()),
    "tir_optimal_token_baseline": (tir_optimal_token_baseline, ()),
}
