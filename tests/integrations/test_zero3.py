"""Test heads whose parameters DeepSpeed ZeRO-3 partitions, with a stand-in for DeepSpeed."""

import pytest
import torch

pytest.importorskip("trl", reason="needs the group `hosts`")

import transformers
import trl.trainer.utils as utils
import zero3_host

import tokfuse
from tokfuse.integrations import hf, trl, zero3
from tokfuse.integrations import trl_seams as host
from tokfuse.integrations.trl_trainer import PolicyHead

V, H = 61, 16


def model(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": H, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model("llama", vocab_size=V, num_key_value_heads=1, **sizes, **options)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def batch():
    ids = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels}


def partition_head(m):
    head = m.get_output_embeddings()
    zero3_host.partition(head.weight, 7)
    return head.weight


def gradients(m):
    """Return the gradients of a step; those of a partitioned parameter come from its reduction."""
    taken = {name: getattr(p, "ds_grads", None) for name, p in m.named_parameters()}
    return {name: p.grad if taken[name] is None else sum(taken[name]) for name, p in m.named_parameters()}


def trl_step(m):
    out = m(**batch(), fused_lm_head=True)
    (out.loss + 0.1 * out.entropy.sum()).backward()
    return out.loss.detach(), gradients(m)


def assert_equal(one, other):
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def fused_model():
    m = model()
    utils.add_fused_lm_head(m, outputs=("log_probs", "entropy"))
    return m


def test_trls_head_is_gathered_once():
    with trl.installed():
        whole = trl_step(fused_model())
        m = fused_model()
        with zero3_host.deepspeed() as deepspeed:
            weight = partition_head(m)
            assert_equal(trl_step(m), whole)
            assert deepspeed.gathers == 1 and len(weight.ds_grads) == 1
            assert weight.numel() == 0 and weight.grad is None
            trl_step(m)  # gradient accumulation
            assert deepspeed.gathers == 2 and torch.equal(*weight.ds_grads)


def test_a_policy_step_needs_the_head_in_the_forward_only():
    def run(m):
        given = {"old_logp": None, "advantage": torch.linspace(-1, 1, 12), "objective": tokfuse.Objective()}
        head = PolicyHead({**given, "normalizer": 12})
        with host.rebound(head):
            m(**batch(), fused_lm_head=True)
        head.step.loss.backward()
        return head.step.loss.detach(), gradients(m)

    whole, m = run(fused_model()), fused_model()
    with zero3_host.deepspeed() as deepspeed:
        partition_head(m)
        assert_equal(run(m), whole)
        assert deepspeed.gathers == 1


@pytest.mark.parametrize("grad", [True, False])
def test_hf_gathers_the_head(grad):
    plain = model()
    hf.install(plain)
    m = model()

    def run(m):
        with torch.set_grad_enabled(grad):
            loss = m(**batch(), skip_logits=True).loss
        if grad:
            loss.backward()
        return loss.detach(), gradients(m) if grad else {}

    with zero3_host.deepspeed() as deepspeed:
        weight = partition_head(m)
        namespace = {"__name__": "deepspeed.runtime.zero.parameter_offload"}
        exec("def hook(module, inputs): raise AssertionError('the layer was called')", namespace)
        m.lm_head.register_forward_pre_hook(namespace["hook"])
        hf.install(m)
        assert f"head {V} x {H}" in hf.describe(m)
        assert deepspeed.gathers == 0  # no collective of one rank
        assert_equal(run(m), run(plain))
        assert deepspeed.gathers == 1 and weight.numel() == 0
        m.lm_head.register_forward_pre_hook(lambda module, inputs: None)
        with pytest.raises(ValueError, match="lm_head must be a linear layer without hooks"):
            run(m)


def test_a_parameter_that_is_there_is_not_gathered_again():
    """A tied embedding, which the transformer holds, and a head inside TRL's own context."""
    with zero3_host.deepspeed() as deepspeed:
        weight = torch.nn.Parameter(torch.randn(V, H))
        zero3_host.partition(weight, 0)
        with deepspeed([weight]):
            (whole, none) = zero3.gathered(weight, None)
            assert none is None and whole.data_ptr() == weight.data_ptr()
        assert deepspeed.gathers == 1 and weight.numel() == 0
        assert whole.shape == (V, H)
        twice = zero3.gathered(weight, weight)
        assert deepspeed.gathers == 2
        with deepspeed([weight]):  # DeepSpeed keeps a parameter for the whole forward and backward if it saw the access
            (held,) = zero3.gathered(weight)
            held.sum().backward()
            assert weight.shape == (V, H)
        assert torch.equal(weight.ds_grads.pop(), torch.ones(V, H))
        sum(x.sum() for x in (whole, *twice)).backward()
        assert weight.numel() == 0
        assert torch.equal(weight.ds_grads[0], torch.full((V, H), 3.0))
    plain = torch.nn.Parameter(torch.ones(2))
    assert zero3.gathered(plain, None) == (plain, None)


def test_hf_refuses_a_partitioned_adapter():
    peft = pytest.importorskip("peft", reason="needs the group `hosts`")
    m = peft.get_peft_model(model(), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with zero3_host.deepspeed():
        for number, p in enumerate(m.get_base_model().lm_head.parameters()):
            zero3_host.partition(p, number)
        with pytest.raises(ValueError, match="adapter of lm_head must be absent under DeepSpeed ZeRO-3"):
            hf.install(m)
