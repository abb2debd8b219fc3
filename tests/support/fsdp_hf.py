"""Train a tiny model with `hf.install` under FSDP1 and FSDP2 on two ranks; a rank exits with an error at a difference.

Each case runs with the lm_head in the root unit, and with the lm_head as a separate unit.
"""

import functools
import itertools
from collections.abc import Callable

import pytest
import ranks_end
import tiny_hf
import torch
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy

from tokfuse.integrations import fsdp, hf

TOLERANCE = 2e-6


def fsdp1(model: torch.nn.Module, own_unit: bool, **options) -> torch.nn.Module:
    units = [*model.model.layers, *([model.lm_head] if own_unit else [])]
    policy = CustomPolicy(lambda module: any(module is unit for unit in units))
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"), **options
    )


def fsdp2(model: torch.nn.Module, own_unit: bool) -> torch.nn.Module:
    for unit in [*model.model.layers, *([model.lm_head] if own_unit else [])]:
        fully_shard(unit)
    return fully_shard(model)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients of all parameters, whole."""

    def whole() -> dict[str, torch.Tensor]:
        found = {}
        for name, parameter in model.named_parameters():
            grad = parameter.grad
            full = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            found[name.replace("_fsdp_wrapped_module.", "")] = full.clone()
        return found

    if not isinstance(model, FullyShardedDataParallel):
        return whole()
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        return whole()


def run(shard: Callable[..., torch.nn.Module], own_unit: bool, install: str, ids: torch.Tensor):
    model = tiny_hf.make("llama", tie_word_embeddings=False, num_hidden_layers=2)
    if install == "before":
        hf.install(model)
    sharded = shard(model, own_unit)
    if install == "after":
        hf.install(model)
    for _ in range(2):  # the second forward finds the units resharded
        sharded.zero_grad()
        output = sharded(input_ids=ids, labels=ids)
        assert (output.logits is None) == (install != "never")
        output.loss.backward()
    return output.loss.detach(), gradients(sharded), model


def check(got, want, what: str) -> None:
    loss, grads, _ = got
    assert abs(loss - want[0]) <= TOLERANCE * abs(want[0]), f"{what}: loss {loss} instead of {want[0]}"
    assert grads.keys() == want[1].keys()
    for name, grad in grads.items():
        far = (grad - want[1][name]).abs().max() / want[1][name].abs().max()
        assert far <= TOLERANCE, f"{what}: gradient of {name} is {far} from that without tokfuse"


def check_refusals(shard: Callable[..., torch.nn.Module], ids: torch.Tensor) -> None:
    """Code that other libraries put on a sharded head is refused at the call, and stays."""
    model = tiny_hf.make("llama", tie_word_embeddings=False, num_hidden_layers=2)
    hf.install(model)
    sharded = shard(model, True)
    inner = fsdp.unwrapped(model.lm_head)
    inner.forward = replaced = functools.partial(torch.nn.functional.linear, weight=torch.zeros(tiny_hf.V, tiny_hf.H))
    with pytest.raises(ValueError, match="got a forward of its own"):
        sharded(input_ids=ids, labels=ids)
    assert vars(inner)["forward"] is replaced
    del inner.forward
    hook = model.lm_head.register_forward_hook(lambda module, args, output: output)
    with pytest.raises(ValueError, match="got hooks"):
        sharded(input_ids=ids, labels=ids)
    hook.remove()
    assert sharded(input_ids=ids, labels=ids).loss > 0
    assert "forward" not in vars(inner)


def main() -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    ids = torch.randint(3, tiny_hf.V, (4, tiny_hf.L), generator=torch.Generator().manual_seed(1))[2 * rank :][:2]
    for shard, own_unit in itertools.product((fsdp1, fsdp2), (False, True)):
        stock = run(shard, own_unit, "never", ids)
        for install in ("before", "after"):
            ours = run(shard, own_unit, install, ids)
            check(ours, stock, f"{shard.__name__}, own unit {own_unit}, install {install}")
            assert f"head {tiny_hf.V} x {tiny_hf.H}" in hf.describe(ours[2])
            if own_unit:
                with pytest.raises(ValueError, match=r"lm_head\.weight must be a plain tensor .* got sharded by FSDP"):
                    hf.head_of(ours[2])
    for shard in (fsdp1, fsdp2):
        check_refusals(shard, ids)
    # Under mixed precision, the unit of the lm_head converts the hidden states, with tokfuse as without.
    mixed = functools.partial(fsdp1, mixed_precision=MixedPrecision(param_dtype=torch.bfloat16))
    stock, ours = (run(mixed, True, install, ids) for install in ("never", "before"))
    assert abs(ours[0] - stock[0]) < 2e-3 * stock[0]
    assert (ours[1]["lm_head.weight"] - stock[1]["lm_head.weight"]).norm() < 0.01 * stock[1]["lm_head.weight"].norm()
    ranks_end.now()


if __name__ == "__main__":
    main()
