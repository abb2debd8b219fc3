"""verl 0.9: tokfuse's losses and advantages by name, and optionally its fused heads.

verl imports this module automatically, in the driver and in every Ray worker (entry point group `verl.plugins`). The
module registers new names and changes nothing in verl:

    actor_rollout_ref.actor.policy_loss.loss_mode=tokfuse_vanilla       # every loss of verl, fused
    actor_rollout_ref.actor.policy_loss.loss_mode=tokfuse_bapo          # methods of tokfuse
    algorithm.adv_estimator=tokfuse_grpo
    distillation.distillation_loss.loss_mode=tokfuse_forward_kl_topk    # and verl's one-sample estimators

`install()` also replaces verl's fused heads (`model.use_fused_kernels=True`) with `tokfuse.linear_token_stats`. To do
so in all processes, set TOKFUSE_VERL_HEADS=1 in the environment of the job. `uninstall()` restores them, and
`describe()` reports what runs where. If an error occurs while verl loads this module, it is logged as a WARNING,
because verl would hide it.
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from tokfuse.integrations.hosts import Host, Rebinding, where
from tokfuse.runtime.core.errors import refuse

OP = "verl_plugin"
PREFIX = "tokfuse_"
HOST = Host("verl", (0, 9), (0, 9))
VARIABLE = "TOKFUSE_VERL_HEADS"
_REBINDING = Rebinding(OP)


def register_algorithm(name: str, register_as: str | None = None, **options: Any) -> str:
    """Register `tokfuse.algorithms.make(name, **options)` as a policy loss of verl, and return its name there.

    Ray workers get the registered function by name. Therefore call this in a module that every worker imports
    (`VERL_USE_EXTERNAL_MODULES`). A method raises an error when it is called if it keeps state between batches or needs
    more than log-probabilities and advantages.

    Args:
        name: one of `tokfuse.algorithms.list()`.
        register_as: name in verl. None: "tokfuse_<name>".
        options: options of the method.
    """
    HOST.require(OP)
    from verl.trainer.ppo.core_algos import register_policy_loss

    from tokfuse.algorithms import registry
    from tokfuse.integrations import verl_losses

    registry.make(name, **options)  # raises an error now for unknown names and options
    chosen = PREFIX + name if register_as is None else register_as
    register_policy_loss(chosen)(functools.partial(verl_losses.algorithm_loss, name, options))
    return chosen


def register() -> list[str]:
    """Register every loss, advantage estimator and distillation loss by its prefixed name; return the names.

    Calling it again has no effect.
    """
    HOST.require(OP)
    from verl.trainer.ppo import core_algos

    from tokfuse.integrations import verl_advantages, verl_distillation, verl_losses

    names = []
    for name in verl_losses.OF_VERL:
        loss: Callable[..., Any] = functools.partial(verl_losses.verl_loss, name)
        core_algos.register_policy_loss(PREFIX + name)(loss)
        names.append(PREFIX + name)
    names += [register_algorithm(name) for name in verl_losses.OF_ALGORITHMS]
    for name, (function, first) in verl_advantages.ESTIMATORS.items():
        if PREFIX + name not in core_algos.ADV_ESTIMATOR_REGISTRY:
            core_algos.register_adv_est(PREFIX + name)(functools.partial(function, *first))
        names.append(PREFIX + name)
    return names + verl_distillation.register()


def install() -> None:
    """Replace verl's fused heads with tokfuse's in this process. Calling it again has no effect.

    Raises:
        ValueError: verl is missing, or older than the tested versions.
    """
    HOST.require(OP)
    with _REBINDING.lock:
        if _REBINDING.active:
            return
        from tokfuse.integrations import verl_heads

        for owner, attribute, replacement in verl_heads.targets():
            _REBINDING.set(owner, attribute, replacement)


def uninstall() -> None:
    """Restore every attribute that `install` replaced. Raise an error if another patch replaced one later."""
    with _REBINDING.lock:
        _REBINDING.restore()


def describe() -> dict[str, Any]:
    """Return the version of the host, the registered names, and the backend of each op on each device."""
    from tokfuse.integrations import verl_advantages, verl_distillation, verl_losses

    losses = [*verl_losses.OF_VERL, *verl_losses.OF_ALGORITHMS]
    return {
        "host": f"verl {HOST.installed} (tested: {HOST.tested})",
        "losses": {PREFIX + name: where("policy_loss") for name in losses},
        "advantages": [PREFIX + name for name in verl_advantages.ESTIMATORS],
        "distillation": {
            name: where("token_stats_at") if "topk" in name else "torch" for name in verl_distillation.names()
        },
        "heads": where("linear_token_stats") if _REBINDING.active else "verl's own",
    }


def _load() -> None:
    """Register the names; runs on `import verl`. An exception would only appear in verl's debug log."""
    try:
        register()
        setting = os.environ.get(VARIABLE, "0")
        if setting not in ("", "0", "1"):
            raise refuse(OP, VARIABLE, "0 or 1", repr(setting), "Set 1 to install the fused heads.")
        if setting == "1":
            install()
    except Exception as error:
        logging.getLogger(__name__).warning(
            "tokfuse's plug-in for verl did not load, so its names are not registered: %s", error
        )


if HOST.installed is not None:
    _load()
