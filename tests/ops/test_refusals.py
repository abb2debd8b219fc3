"""Test every error of the core ops: its type, its whole text, and that nothing was written before it."""

import re

import pytest
import torch
from harness import assert_untouched, backends
from policy_cases import batch

import tokfuse
from tokfuse import KL, NFT, Objective, PPOClip

NAN = float("nan")
T, V, H = 3, 7, 4


@pytest.fixture(params=backends("token_stats"), autouse=True)
def backend(request):
    with request.param.forced():
        yield request.param


def logits_call(**changes):
    arguments = {"logits": torch.zeros(T, V), "target": torch.tensor([0, 3, 6])} | changes
    return tokfuse.token_stats, arguments


def head_call(**changes):
    arguments = {"hidden": torch.zeros(T, H), "weight": torch.zeros(V, H), "target": torch.tensor([0, 3, 6])} | changes
    return tokfuse.linear_token_stats, arguments


def loss_call(**changes):
    _, inputs = batch().cast(torch.float32)
    arguments = {"logp": torch.zeros(22), "objective": Objective()} | inputs | changes
    return tokfuse.policy_loss, arguments


def step_call(**changes):
    arguments = {
        "logits": torch.zeros(T, V),
        "target": torch.tensor([0, 3, 6]),
        "old_logp": torch.zeros(T),
        "advantage": torch.ones(T),
        "objective": Objective(),
    } | changes
    return tokfuse.policy_step, arguments


NORMAL = "a finite number in [1.17549e-38, 8.50706e+37]"
POSITIVE, CHECK = "a finite number in (0, inf)", "Check its unit and sign."
PACKED = "Pass the packed vector, without padding."
FLOATS = "bfloat16 or float16 or float32 or float64"
LOGITS = [
    (
        lambda: logits_call(logits=torch.zeros(V)),
        "token_stats: target must be of shape (...) with the leading dimensions () of logits; got shape (3,). Give "
        "every token tensor the same leading dimensions, or pack all of them.",
    ),
    (
        lambda: logits_call(logits=torch.zeros(T, V, dtype=torch.int64)),
        f"token_stats: logits must be of dtype {FLOATS}; got int64. Call logits.float().",
    ),
    (
        lambda: logits_call(logits=torch.zeros(T, 0)),
        "token_stats: logits must be at least one column wide; got shape (3, 0). Pass the full vocabulary.",
    ),
    (
        lambda: logits_call(target=torch.tensor([0, 3])),
        f"token_stats: target must be of shape (3,) to match the rows of logits; got shape (2,). {PACKED}",
    ),
    (
        lambda: logits_call(target=torch.tensor([0, 3, 6]).int()),
        "token_stats: target must be of dtype int64; got int32. Call target.long().",
    ),
    (
        lambda: logits_call(target=torch.tensor([0, 7, 6])),
        "token_stats: target must be in [0, 7) in every row where mask is True; got 7 in row 1. Set "
        "mask to False on prompt and padding rows.",
    ),
    (
        lambda: logits_call(target=torch.tensor([0, 3, -100])),
        "token_stats: target must be in [0, 7) in every row where mask is True; got -100 in row 2. "
        "Leave these rows out by mask=(target != -100), or by ignore_index=-100 if the op has this argument.",
    ),
    (
        lambda: logits_call(target=torch.zeros(3, device="meta", dtype=torch.int64)),
        "token_stats: target must be on cpu, like the main input; got meta. Call target.to('cpu').",
    ),
    (
        lambda: logits_call(mask=torch.ones(4, dtype=torch.bool)),
        f"token_stats: mask must be of shape (3,) to match the tokens; got shape (4,). {PACKED}",
    ),
    (
        lambda: logits_call(mask=torch.ones(3)),
        "token_stats: mask must be of dtype bool; got float32. Call mask.bool().",
    ),
    (lambda: logits_call(temperature=0.0), f"token_stats: temperature must be {POSITIVE}; got 0.0. {CHECK}"),
    (lambda: logits_call(temperature=NAN), f"token_stats: temperature must be {POSITIVE}; got nan. {CHECK}"),
    (
        lambda: logits_call(temperature=torch.ones(2)),
        f"token_stats: temperature must be of shape (3,) to match the tokens; got shape (2,). {PACKED}",
    ),
    (
        lambda: logits_call(temperature=torch.tensor([1.0, -2.0, 1.0])),
        "token_stats: temperature must be > 0 in every row where mask is True; got -2.0 in row 1. "
        "Mask the row or fix its temperature.",
    ),
    (
        lambda: logits_call(temperature=torch.tensor([1.0, 1.0, NAN])),
        "token_stats: temperature must be > 0 in every row where mask is True; got nan in row 2. Mask "
        "the row or fix its temperature.",
    ),
    (
        lambda: logits_call(temperature=torch.ones(3, requires_grad=True)),
        "token_stats: temperature must be detached (the op does not differentiate it); got "
        "requires_grad=True. Call temperature.detach().",
    ),
    (lambda: logits_call(temperature=1e-40), f"token_stats: temperature must be {NORMAL}; got 1e-40. {CHECK}"),
    (lambda: logits_call(logit_scale=1e300), f"token_stats: logit_scale must be {NORMAL}; got 1e+300. {CHECK}"),
    (lambda: logits_call(softcap=float("inf")), f"token_stats: softcap must be {POSITIVE}; got inf. {CHECK}"),
    (lambda: logits_call(logit_scale=-1.0), f"token_stats: logit_scale must be {POSITIVE}; got -1.0. {CHECK}"),
    (
        lambda: logits_call(bias_scale=0.5),
        "token_stats: bias_scale must be left out without bias_logits; got 0.5. Remove it: it would have no effect.",
    ),
    (
        lambda: logits_call(bias_logits=torch.zeros(T, V), bias_scale=NAN),
        "token_stats: bias_scale must be a finite number in (-inf, inf); got nan. Check its unit and sign.",
    ),
    (
        lambda: logits_call(bias_logits=torch.zeros(T, V + 1)),
        "token_stats: bias_logits must be (3, 7) torch.float32 like logits; got (3, 8) torch.float32. "
        "Score the same tokens in the same dtype.",
    ),
    (
        lambda: logits_call(bias_logits=torch.zeros(T, V).half()),
        "token_stats: bias_logits must be (3, 7) torch.float32 like logits; got (3, 7) torch.float16. "
        "Score the same tokens in the same dtype.",
    ),
    (
        lambda: logits_call(bias_logits=torch.zeros(T, V, requires_grad=True)),
        "token_stats: bias_logits must be detached (the op does not differentiate it); "
        "got requires_grad=True. Call bias_logits.detach().",
    ),
]
HEAD = [
    (
        lambda: head_call(hidden=torch.zeros(T, 1, H)),
        "linear_token_stats: target must be of shape (...) with the leading dimensions (3, 1) of hidden; got shape "
        "(3,). Give every token tensor the same leading dimensions, or pack all of them.",
    ),
    (
        lambda: head_call(weight=torch.zeros(V, H + 1)),
        "linear_token_stats: weight must be of shape (vocab, hidden) with hidden = 4; got shape "
        "(7, 5). Pass lm_head.weight unchanged.",
    ),
    (
        lambda: head_call(weight=torch.zeros(0, H)),
        "linear_token_stats: weight must be of shape (vocab, hidden) with hidden = 4; got shape "
        "(0, 4). Pass lm_head.weight unchanged.",
    ),
    (
        lambda: head_call(weight=torch.zeros(V, H).long()),
        "linear_token_stats: weight must be of dtype bfloat16 or float16 or float32 or float64; got int64. Call "
        "weight.float().",
    ),
    (
        lambda: head_call(bias=torch.zeros(V + 1)),
        "linear_token_stats: bias must be of shape (7,) to match the rows of weight; got shape (8,). Pass the packed "
        "vector, without padding.",
    ),
    (
        lambda: head_call(target=torch.tensor([0, 3, 7])),
        "linear_token_stats: target must be in [0, 7) in every row where mask is True; got 7 in row "
        "2. Set mask to False on prompt and padding rows.",
    ),
    (
        lambda: head_call(memory_budget=64e6),
        "linear_token_stats: memory_budget must be a whole number of bytes >= 1; got 64000000.0. Omit "
        "it for the default.",
    ),
    (
        lambda: head_call(memory_budget=0),
        "linear_token_stats: memory_budget must be a whole number of bytes >= 1; got 0. Omit it for the default.",
    ),
]
IGNORED = "Remove it: it would have no effect."
ONE_VALUE = "Pass one value per token."
LOSS = [
    (
        lambda: loss_call(logp=torch.zeros(2, 11)),
        "policy_loss: logp must be a floating-point vector of shape (tokens,); got (2, 11) torch.float32. "
        "Call logp[mask], or logp.flatten() with a mask.",
    ),
    (
        lambda: loss_call(logp=torch.zeros(22).long()),
        "policy_loss: logp must be a floating-point vector of shape (tokens,); got (22,) torch.int64. Call "
        "logp[mask], or logp.flatten() with a mask.",
    ),
    (
        lambda: loss_call(old_logp=torch.zeros(21)),
        f"policy_loss: old_logp must be of shape (22,) to match the tokens; got shape (21,). {PACKED}",
    ),
    (
        lambda: loss_call(old_logp=torch.zeros(22, requires_grad=True)),
        "policy_loss: old_logp must be detached (the op does not differentiate it); got "
        "requires_grad=True. Call old_logp.detach().",
    ),
    (
        lambda: loss_call(advantage=torch.zeros(6)),
        f"policy_loss: advantage must be of shape (22,) to match the tokens; got shape (6,). {PACKED}",
    ),
    (
        lambda: loss_call(advantage=torch.zeros(22), advantage_level="sequence"),
        f"policy_loss: advantage must be of shape (6,) to match cu_seqlens; got shape (22,). {PACKED}",
    ),
    (
        lambda: loss_call(advantage=torch.zeros(22).long()),
        f"policy_loss: advantage must be of dtype {FLOATS}; got int64. Call advantage.float().",
    ),
    (
        lambda: loss_call(advantage_level="group"),
        "policy_loss: advantage_level must be 'token' or 'sequence'; got 'group'. Pass one of the two.",
    ),
    (lambda: loss_call(mask=torch.ones(22)), "policy_loss: mask must be of dtype bool; got float32. Call mask.bool()."),
    (
        lambda: loss_call(cu_seqlens=torch.tensor([0, 22])),
        "policy_loss: cu_seqlens must be of dtype int32; got int64. Call cu_seqlens.int().",
    ),
    (
        lambda: loss_call(cu_seqlens=torch.zeros(0).int()),
        "policy_loss: cu_seqlens must be of shape (num_seqs + 1,); got shape (0,). Pass [0] for zero sequences.",
    ),
    (
        lambda: loss_call(cu_seqlens=torch.tensor([1, 22]).int()),
        "policy_loss: cu_seqlens must be a prefix sum that starts at 0; got 1. Prepend 0.",
    ),
    (
        lambda: loss_call(cu_seqlens=torch.tensor([0, 21]).int()),
        "policy_loss: cu_seqlens must be a prefix sum that ends at num_tokens = 22; got 21. Pass "
        "the offsets of exactly these tokens.",
    ),
    (
        lambda: loss_call(cu_seqlens=torch.tensor([0]).int()),
        "policy_loss: cu_seqlens must be a prefix sum that ends at num_tokens = 22; got 0. Pass "
        "the offsets of exactly these tokens.",
    ),
    (
        lambda: loss_call(cu_seqlens=torch.tensor([0, 9, 8, 22]).int()),
        "policy_loss: cu_seqlens must be non-decreasing; got 9 then 8 at 1. Sequence lengths cannot be negative.",
    ),
    (
        lambda: loss_call(cu_seqlens=None, objective=Objective(level="sequence")),
        "policy_loss: cu_seqlens must be given for level='sequence', aggregation='token_mean'; got "
        "None. Pass the packing offsets (seqs + 1,) int32.",
    ),
    (
        lambda: loss_call(cu_seqlens=None, objective=Objective(aggregation="seq_mean_token_sum")),
        "policy_loss: cu_seqlens must be given for level='token', aggregation='seq_mean_token_sum'; "
        "got None. Pass the packing offsets (seqs + 1,) int32.",
    ),
    (
        lambda: loss_call(cu_seqlens=None, advantage=torch.zeros(2), advantage_level="sequence"),
        "policy_loss: cu_seqlens must be given for advantage_level='sequence'; got None. Pass the "
        "packing offsets (seqs + 1,) int32.",
    ),
    (
        lambda: loss_call(normalizer=0.0),
        "policy_loss: normalizer must be a finite number in (0, inf); got 0.0. Check its unit and sign.",
    ),
    (
        lambda: loss_call(normalizer=float("inf")),
        "policy_loss: normalizer must be a finite number in (0, inf); got inf. Check its unit and sign.",
    ),
    (
        lambda: loss_call(normalizer="tokens"),
        "policy_loss: normalizer must be None, a number, a 0-dim tensor or 'batch'; got 'tokens'. "
        "Pass the global token or sequence count.",
    ),
    (
        lambda: loss_call(normalizer=torch.tensor(True)),
        "policy_loss: normalizer must be of dtype bfloat16 or float16 or float32 or float64 or int32 or int64; got "
        "bool. Call normalizer.float().",
    ),
    (
        lambda: loss_call(normalizer=torch.tensor(2.0, requires_grad=True)),
        "policy_loss: normalizer must be detached (the op does not differentiate it); got requires_grad=True. Call "
        "normalizer.detach().",
    ),
    (
        lambda: loss_call(normalizer=torch.ones(2)),
        "policy_loss: normalizer must be a 0-dim tensor; got shape (2,). Pass one global count.",
    ),
    (
        lambda: loss_call(normalizer="batch", objective=Objective(aggregation="token_sum")),
        "policy_loss: normalizer must be a number with aggregation='token_sum'; got 'batch'. "
        "Pass sequences * max length, as Dr.GRPO does.",
    ),
    (
        lambda: loss_call(objective=Objective(kl=KL(coef=0.1))),
        f"policy_loss: ref_logp must be given for a KL term; got None. {ONE_VALUE}",
    ),
    (
        lambda: loss_call(objective=Objective(entropy_coef=0.1)),
        f"policy_loss: entropy must be given for an entropy bonus; got None. {ONE_VALUE}",
    ),
    (
        lambda: loss_call(objective=Objective(shape=NFT())),
        f"policy_loss: signal must be given for shape NFT; got None. {ONE_VALUE}",
    ),
    (
        lambda: loss_call(signal=torch.zeros(22)),
        f"policy_loss: signal must be None with shape PPOClip; got a tensor. {IGNORED}",
    ),
    (
        lambda: loss_call(kl_weight=torch.zeros(22)),
        f"policy_loss: kl_weight must be None with kl=None; got a tensor. {IGNORED}",
    ),
    (
        lambda: loss_call(anchor_logp=torch.zeros(22)),
        f"policy_loss: anchor_logp must be None with anchor=None; got a tensor. {IGNORED}",
    ),
    (
        lambda: loss_call(anchor_weight=torch.zeros(22)),
        f"policy_loss: anchor_weight must be None with anchor=None; got a tensor. {IGNORED}",
    ),
    (
        lambda: loss_call(objective=Objective(anchor=KL(coef=0.1))),
        f"policy_loss: anchor_logp must be given for an anchor term; got None. {ONE_VALUE}",
    ),
    (
        lambda: loss_call(entropy_weight=torch.zeros(22)),
        f"policy_loss: entropy_weight must be None with entropy_coef=0; got a tensor. {IGNORED}",
    ),
    (
        lambda: loss_call(sampler_logp=torch.zeros(3)),
        f"policy_loss: sampler_logp must be of shape (22,) to match the tokens; got shape (3,). {PACKED}",
    ),
    (
        lambda: loss_call(token_weight=torch.zeros(22, device="meta")),
        "policy_loss: token_weight must be on cpu, like the main input; got meta. Call token_weight.to('cpu').",
    ),
]
STEP = [
    (
        lambda: step_call(logits=None),
        "policy_step: input must be either logits= or hidden= with weight=; got neither. Pass one of the two.",
    ),
    (
        lambda: step_call(hidden=torch.zeros(T, H)),
        "policy_step: input must be either logits= or hidden= with weight=; got both. Pass one of the two.",
    ),
    (
        lambda: step_call(bias=torch.zeros(V)),
        "policy_step: bias must be left out with logits=; got a tensor. Remove it: it would have no effect.",
    ),
    (
        lambda: step_call(memory_budget=1 << 20),
        "policy_step: memory_budget must be left out with logits=; got 1048576. Remove it: it would have no effect.",
    ),
    (
        lambda: step_call(logits=None, hidden=torch.zeros(T, H)),
        "policy_step: weight must be given with hidden=; got None. Pass lm_head.weight.",
    ),
    (
        lambda: step_call(
            logits=None, hidden=torch.zeros(T, H), weight=torch.zeros(V, H), target=torch.tensor([0, -1, 2])
        ),
        "policy_step: target must be in [0, 7) in every row where mask is True; got -1 in row 1. Set "
        "mask to False on prompt and padding rows.",
    ),
    (
        lambda: step_call(target=torch.tensor([0, 9, 2])),
        "policy_step: target must be in [0, 7) in every row where mask is True; got 9 in row 1. Set "
        "mask to False on prompt and padding rows.",
    ),
    (
        lambda: step_call(
            target=torch.tensor([0, 9, 2]), cu_seqlens=torch.tensor([0, 3]).int(), objective=Objective(level="sequence")
        ),
        "policy_step: target must be in [0, 7) in every row where mask is True; got 9 in row 1. Set "
        "mask to False on prompt and padding rows.",
    ),
    (
        lambda: step_call(token_weight=torch.ones(2)),
        f"policy_step: token_weight must be of shape (3,) to match the tokens; got shape (2,). {PACKED}",
    ),
]
ALL = [*LOGITS, *HEAD, *LOSS, *STEP]


@pytest.mark.parametrize(("build", "text"), ALL, ids=[text[:60] for _, text in ALL])
def test_value_errors(build, text: str):
    call, arguments = build()

    def refused() -> None:
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            call(**arguments)

    here = {k: v for k, v in arguments.items() if getattr(v, "device", None) != torch.device("meta")}
    assert_untouched(refused, here)


TYPES = [
    (lambda: logits_call(logits=[[0.0]]), "token_stats: logits must be a torch.Tensor; got list. "),
    (lambda: logits_call(target=[0, 3, 6]), "token_stats: target must be a torch.Tensor; got list."),
    (lambda: logits_call(mask=[True] * 3), "token_stats: mask must be a torch.Tensor; got list."),
    (lambda: logits_call(bias_logits=1.0), "token_stats: bias_logits must be a torch.Tensor; got float."),
    (lambda: head_call(weight=torch.nn.Linear(H, V)), "linear_token_stats: weight must be a torch.Tensor; got Linear."),
    (lambda: head_call(bias=0.0), "linear_token_stats: bias must be a torch.Tensor; got float."),
    (lambda: loss_call(logp=None), "policy_loss: logp must be a torch.Tensor; got NoneType."),
    (lambda: loss_call(old_logp=1.0), "policy_loss: old_logp must be a torch.Tensor; got float."),
    (lambda: loss_call(advantage=1.0), "policy_loss: advantage must be a torch.Tensor; got float."),
    (lambda: loss_call(cu_seqlens=[0, 22]), "policy_loss: cu_seqlens must be a torch.Tensor; got list."),
    (lambda: logits_call(moments=1), "token_stats: moments must be True or False; got 1. Pass"),
    (
        lambda: (tokfuse.cross_entropy, logits_call(return_stats=1)[1]),
        "cross_entropy: return_stats must be True or False; got 1. Pass a bool.",
    ),
    (
        lambda: (tokfuse.linear_cross_entropy, head_call(return_stats="yes")[1]),
        "linear_cross_entropy: return_stats must be True or False; got 'yes'. Pass a bool.",
    ),
    (
        lambda: logits_call(temperature="1"),
        "token_stats: temperature must be a number; got '1'. Pass an int or a float.",
    ),
    (
        lambda: logits_call(temperature=True),
        "token_stats: temperature must be a number; got True. Pass an int or a float.",
    ),
    (
        lambda: logits_call(logit_scale=torch.tensor(0.5)),
        "token_stats: logit_scale must be a number; got tensor(0.5000). Pass an int or a float.",
    ),
    (
        lambda: logits_call(softcap=torch.ones(3)),
        "token_stats: softcap must be a number; got tensor([1., 1., 1.]). Pass an int or a float.",
    ),
    (lambda: loss_call(entropy=1.0), "policy_loss: entropy must be a torch.Tensor; got float."),
    (lambda: loss_call(normalizer=[22]), "policy_loss: normalizer must be a number; got [22]. Pass an int or a float."),
    (
        lambda: step_call(compact_clipped="no"),
        "policy_step: compact_clipped must be True or False; got 'no'. Pass a bool.",
    ),
    (
        lambda: step_call(logits=None, hidden=torch.zeros(T, H), weight=torch.zeros(V, H), influence="norms"),
        "policy_step: influence must be an InfluenceSpec; got 'norms'. Pass InfluenceSpec().",
    ),
    (
        lambda: loss_call(objective=PPOClip()),
        "policy_loss: objective must be a tokfuse.Objective; got PPOClip. Pass, for example,",
    ),
    (
        lambda: step_call(objective="grpo"),
        "policy_step: objective must be a tokfuse.Objective; got str. Pass, for example,",
    ),
]


@pytest.mark.parametrize(("build", "text"), TYPES, ids=[text[:50] for _, text in TYPES])
def test_type_errors(build, text: str):
    call, arguments = build()
    with pytest.raises(TypeError, match=f"^{re.escape(text)}"):
        call(**arguments)


@pytest.mark.parametrize(
    ("make", "actual"),
    [
        (lambda x: x.to_sparse(), r"layout torch.sparse_coo. Call logits.to_dense\(\)"),
        (lambda x: x.to_mkldnn(), r"layout torch._mkldnn. Call logits.to_dense\(\)"),
        (lambda x: torch.nested.nested_tensor([*x]), r"a nested tensor. Pack its rows: torch.cat\(logits.unbind\(\)\)"),
    ],
)
def test_a_tensor_that_is_not_dense(make, actual):
    call, arguments = logits_call(logits=make(torch.zeros(T, V)))
    with pytest.raises(ValueError, match=f"^token_stats: logits must be a dense tensor; got {actual}"):
        call(**arguments)


def test_masked_rows_may_hold_anything():
    """The same values raise an error in a valid row."""
    mask = torch.tensor([True, False, True])
    call, arguments = logits_call(
        target=torch.tensor([0, -100, 6]), mask=mask, temperature=torch.tensor([1.0, 0.0, 2.0])
    )
    assert call(**arguments).logp.isfinite().all()
    call, arguments = head_call(target=torch.tensor([0, 99, 6]), mask=mask)
    assert call(**arguments).logp.isfinite().all()
