"""The words that TRL, verl, OpenRLHF and others use for an option or a method, and tokfuse's words for the same."""

import difflib
from collections.abc import Collection

_CLIP = "shape=PPOClip(low=..., high=...)"
_KL = "kl=KL(coef=...)"

# word of a host -> (our option, how to write it)
OPTIONS = {
    "beta": ("kl", _KL),
    "kl_coef": ("kl", _KL),
    "kl_loss_coef": ("kl", _KL),
    "init_kl_coef": ("kl", _KL),
    "init_kl_coeff": ("kl", _KL),
    "use_kl_loss": ("kl", _KL),
    "kl_loss_type": ("kl", "kl=KL(coef=..., estimator=...)"),
    "kl_estimator": ("kl", "kl=KL(coef=..., estimator=...)"),
    "reference_policy_kl_penalty": ("kl", _KL),
    "use_kl_in_reward": ("reward_kl", "reward_kl=..."),
    "kl_ctrl": ("kl_control", "kl_control=KLControl(target=..., horizon=...)"),
    "clip_ratio": ("shape", _CLIP),
    "clip_range": ("shape", _CLIP),
    "cliprange": ("shape", _CLIP),
    "epsilon": ("shape", _CLIP),
    "eps_clip": ("shape", _CLIP),
    "clip_eps": ("shape", _CLIP),
    "clip_ratio_low": ("shape", "shape=PPOClip(low=...)"),
    "eps_clip_low": ("shape", "shape=PPOClip(low=...)"),
    "clip_ratio_high": ("shape", "shape=PPOClip(high=...)"),
    "epsilon_high": ("shape", "shape=PPOClip(high=...)"),
    "eps_clip_high": ("shape", "shape=PPOClip(high=...)"),
    "clip_ratio_c": ("shape", "shape=PPOClip(dual=...)"),
    "dual_clip": ("shape", "shape=PPOClip(dual=...)"),
    "loss_agg_mode": ("aggregation", "aggregation='token_mean'"),
    "loss_type": ("aggregation", "aggregation='token_mean'"),
    "token_level_loss": ("aggregation", "aggregation='token_mean'"),
    "scale_rewards": ("scale", "scale='std' or 'none'"),
    "norm_adv_by_std_in_grpo": ("scale", "scale='std' or 'none'"),
    "adv_estimator": ("advantage", "advantage='grpo'"),
    "advantage_estimator": ("advantage", "advantage='grpo'"),
    "importance_sampling_level": ("level", "level='token' or 'sequence'"),
    "entropy_coeff": ("entropy_coef", "entropy_coef=..."),
    "entropy_loss_coef": ("entropy_coef", "entropy_coef=..."),
    "lambda_": ("lam", "lam=..."),
    "gae_lambda": ("lam", "lam=..."),
    "lambd": ("lam", "lam=..."),
    "max_completion_length": ("max_length", "max_length=..."),
    "max_response_length": ("max_length", "max_length=..."),
    "overlong_buffer": ("overlong", "overlong=Overlong(max_length=..., cache=...)"),
    "filter_groups": ("skip_uniform", "skip_uniform=True"),
    "dynamic_sampling": ("skip_uniform", "skip_uniform=True"),
    "rollout_is": ("correction", "correction=Correction(...)"),
    "vllm_importance_sampling_correction": ("correction", "correction=Correction(...)"),
    "vllm_importance_sampling_cap": ("correction", "correction=Correction(high=...)"),
    "tis_imp_ratio_cap": ("correction", "correction=Correction(high=...)"),
    "label_smoothing": ("smoothing", "smoothing=..."),
    "simpo_gamma": ("gamma", "gamma=..."),
    "lmbda": ("lam", "lam=..."),
    "distillation_alpha": ("beta", "beta=..."),
    "distillation_topk": ("k", "k=..."),
    "topk": ("k", "k=..."),
    "distillation_is_clip": ("ratio_max", "ratio_max=..."),
    "num_loss_tokens_to_skip": ("skip_tokens", "skip_tokens=..."),
    "log_prob_min_clamp": ("logp_min", "logp_min=..."),
    "skew_alpha": ("alpha", "alpha=..."),
    "teacher_mixed_alpha": ("alpha", "alpha=..."),
}

# what a host sets elsewhere -> where it goes here
ELSEWHERE = {
    "temperature": "Pass temperature to token_stats and policy_step: it belongs to the logits.",
    "num_generations": "Set group_ids on the Batch.",
    "group_size": "Set group_ids on the Batch.",
    "num_iterations": "Pass epochs to train_step.",
    "ppo_epochs": "Pass epochs to train_step.",
    "ppo_mini_batch_size": "Pass minibatches (their number) to train_step.",
    "ppo_micro_batch_size": "Pass micro_batches (their number) to train_step.",
    "learning_rate": "Set it on the optimizer.",
    "lr": "Set it on the optimizer.",
    "max_grad_norm": "Pass max_gradient to train_step.",
    "grad_clip": "Pass max_gradient to train_step.",
    "mask_truncated_completions": "Set mask to False on the tokens of a cut response.",
    "reward_weights": "Set reward on the Batch to the weighted sum.",
}

# name that a host gives to a method -> our name
METHODS = {
    "reinforce++": "reinforce_pp",
    "reinforce_plus_plus": "reinforce_pp",
    "reinforce++_baseline": "reinforce_pp_baseline",
    "reinforce_plus_plus_baseline": "reinforce_pp_baseline",
    "drgrpo": "dr_grpo",
    "bnpo": "grpo",
    "gae": "ppo",
    "vanilla": "ppo_dual",
    "geo_mean": "gmpo",
    "grpo_guard_flow": "grpo_guard",
    "dcpo": "dcpo_dist",
    "a2pr": "a2pr_nll",
    "80_20": "high_entropy",
    "truncated_importance_sampling": "tis",
    "sigmoid": "dpo",
    "kto_pair": "kto",
}


def nearest(word: object, known: Collection[str]) -> str | None:
    """Return the known name that is most similar to `word`, if one is."""
    plain = str(word).lower().replace("-", "_").replace(" ", "_").replace(".", "_")
    for candidate in (plain, plain.replace("_", "")):
        if candidate in known:
            return candidate
    near = difflib.get_close_matches(plain, known, n=1)
    return near[0] if near else None


def method_hint(name: object, known: Collection[str]) -> str | None:
    """Return the name of the method that `name` probably means, or None."""
    plain = str(name).lower().replace("-", "_")
    return METHODS[plain] if METHODS.get(plain) in known else nearest(name, known)


def option_hint(option: str, known: Collection[str]) -> str:
    """Return a sentence that says how to write the option of another framework, or the nearest one here."""
    ours, how = OPTIONS.get(option, ("", ""))
    if ours in known:
        return f"Write {how}."
    if option in ELSEWHERE:
        return ELSEWHERE[option]
    near = nearest(option, known)
    return f"Did you mean {near!r}?" if near else ""
