"""Test TRL's distillation trainers on tokfuse against the stock trainers: real steps, every option of the loss.

As in test_trl_losses.py, the reference is TRL's own code in float64: no loss, gradient norm, metric or weight may be
farther from it than the stock float32 run (`host_parity`).
"""

import inspect
import os
from contextlib import nullcontext
from unittest import mock

import pytest
import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl", reason="needs the group `hosts`")

import tiny_grpo
import trl.trainer.distillation_trainer as stable
from host_parity import assert_no_farther, exact_divergence, trl_distillation_in_float64
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.async_distillation import async_distillation_trainer as async_trainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold.gold_trainer import GOLDTrainer
from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer
from trl.experimental.sdft import sdft_trainer
from trl.experimental.sdpo import sdpo_trainer

from tokfuse.integrations import hosts, trl, trl_distillation

CLOCKS = ("time", "per_second", "runtime")
BETAS = (0.0, 0.3, 1.0)
B, T, H, G, V = 3, 5, 12, 20, 37
LEAVES = ("student_hidden_states", "student_lm_head_weight", "student_lm_head_bias")
TRANSFORMS = {
    "student_logit_scale": 0.7,
    "teacher_logit_scale": 1.3,
    "student_final_logit_softcapping": 4.0,
    "teacher_final_logit_softcapping": 6.0,
    "temperature": 0.8,
}


# ------------------------------------------------------------------------ the loss from two heads


def heads(bias=False, dtype=torch.float32):
    """Return the tensors of TRL's loss: three sequences of different lengths, a wider teacher."""
    gen = torch.Generator().manual_seed(1)
    shapes = {
        "student_hidden_states": (B, T, H),
        "teacher_hidden_states": (B, T, G),
        "student_lm_head_weight": (V, H),
        "teacher_lm_head_weight": (V, G),
    }
    if bias:
        shapes |= {"student_lm_head_bias": (V,), "teacher_lm_head_bias": (V,)}
    given = {name: (torch.randn(shape, generator=gen) * 0.6).to(dtype) for name, shape in shapes.items()}
    mask = (torch.arange(T) < torch.tensor([[5], [2], [4]])).long()
    mask[0, 1] = 0  # a token of a tool, which is not trained on
    return given | {"completion_mask": mask}


def step(given, frozen=(), **options):
    """Run TRL's loss and its backward; return every number."""
    leaves = {name: given[name].clone().requires_grad_(name not in frozen) for name in LEAVES if name in given}
    loss, entropy, count = stable._chunked_divergence_loss(**{**given, **leaves}, **options)
    loss.backward()
    return {"loss": loss, "entropy": entropy, "count": count} | {name: x.grad for name, x in leaves.items()}


def three(run):
    """Return the results of tokfuse, of stock TRL and of TRL in float64."""
    with trl.installed():
        ours = run()
    stock = run()
    with trl_distillation_in_float64():
        return ours, stock, run()


def assert_step(ours, stock, exact):
    assert ours.keys() == stock.keys() == exact.keys()
    for name in exact:
        if exact[name] is None:
            assert ours[name] is None, name
        else:
            assert_no_farther(ours[name], stock[name], exact[name], what=name)


@pytest.mark.parametrize("items", [None, 7, torch.tensor(5.5)])
@pytest.mark.parametrize("beta", BETAS)
def test_two_heads(beta, items):
    assert_step(*three(lambda: step(heads(), beta=beta, num_items_in_batch=items)))


@pytest.mark.parametrize("beta", BETAS)
def test_two_heads_with_every_transform(beta):
    ours, stock, exact = three(lambda: step(heads(bias=True), beta=beta, **TRANSFORMS))
    assert_step(ours, stock, exact)
    for name, other in TRANSFORMS.items():  # otherwise an ignored option would pass
        plain = step(heads(bias=True), beta=beta, **{**TRANSFORMS, name: 2 * other})
        assert abs(plain["loss"].item() - stock["loss"].item()) > 1e-4, name


def test_a_frozen_head_gets_no_gradient():
    frozen = LEAVES[1:]
    ours, stock, exact = three(lambda: step(heads(bias=True), frozen, beta=0.3))
    assert_step(ours, stock, exact)
    assert ours["student_lm_head_weight"] is None is ours["student_lm_head_bias"]


def test_a_batch_without_a_token_is_a_differentiable_zero():
    given = heads() | {"completion_mask": torch.zeros(B, T, dtype=torch.long)}
    for items in (None, torch.tensor(3.0)):
        ours, stock, exact = three(lambda items=items: step(given, beta=0.3, num_items_in_batch=items))
        assert_step(ours, stock, exact)
        assert not ours["loss"] and not ours["student_hidden_states"].any()


def assert_rounded_once(ours, stock, exact, dtype):
    """TRL rounds each tile of the gradient to 16 bits before the matrix products; tokfuse rounds their result once."""
    for name in exact:
        mine, theirs, truth = (x[name].double() for x in (ours, stock, exact))
        error, own = ((x - truth).abs().max().item() for x in (mine, theirs))
        assert error <= own + torch.finfo(dtype).eps * truth.abs().max().item(), name
        assert ours[name].dtype == stock[name].dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", BETAS)
def test_sixteen_bits(beta, dtype):
    assert_rounded_once(*three(lambda: step(heads(dtype=dtype), beta=beta)), dtype)


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        ours, stock, _ = three(lambda: step(heads(), beta=0.3))
    rounded = {name: x.float() if x.is_floating_point() else x for name, x in heads(dtype=torch.bfloat16).items()}
    with trl_distillation_in_float64():
        exact = step(rounded, beta=0.3)
    assert_rounded_once(ours, stock, exact, torch.bfloat16)


def test_float16_gradients_are_scaled_before_they_are_rounded():
    """With a loss scale of 2^16, gradients below the smallest float16 number must survive."""

    def run():
        given = heads(dtype=torch.float16)
        hidden = given["student_hidden_states"].requires_grad_()
        loss = stable._chunked_divergence_loss(**given, beta=0.3, num_items_in_batch=10**6)[0]
        (loss * 2.0**16).backward()
        return hidden.grad.double() / 2.0**16

    with trl.installed():
        ours = run()
    stock = run()
    assert float(stock.abs().max()) < 2.0**-23
    torch.testing.assert_close(ours, stock, rtol=5e-3, atol=float(stock.abs().max()) * 5e-3)


def test_sharded_heads_are_gathered():
    """Under FSDP2 a head is a DTensor, and so is its gradient."""
    from torch.distributed.tensor import Shard, distribute_tensor

    plain = three(lambda: step(heads(bias=True), beta=0.3))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        given = {
            name: distribute_tensor(x, mesh, [Shard(0)]) if "lm_head" in name else x
            for name, x in heads(bias=True).items()
        }
        with trl.installed():
            ours = step(given, beta=0.3)
        whole = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in ours.items()}
    finally:
        torch.distributed.destroy_process_group()
    assert type(ours["student_lm_head_weight"]) is type(given["student_lm_head_weight"])
    assert_step(whole, *plain[1:])


@pytest.mark.parametrize("case", ["zero3", "device"])
def test_what_the_heads_leave_to_trl(case, monkeypatch):
    given = heads()
    if case == "zero3":
        given["teacher_lm_head_weight"].ds_id = 3
    else:
        monkeypatch.setattr(hosts, "has_kernels", lambda op, device, dtype: False)
    stock = step(given, beta=0.3, temperature=0.7)
    with trl.installed():
        ours = step(given, beta=0.3, temperature=0.7)
    assert all(torch.equal(ours[name], stock[name]) for name in stock)  # bitwise: TRL's own code ran


# --------------------------------------------------------------- the loss from a head and candidates


def candidates(teachers, dtype=torch.float32):
    """Return the positional arguments of `_chunked_jsd_loss` up to the mask, and the teacher of each row."""
    gen = torch.Generator().manual_seed(4)
    hidden, weight, bias = (torch.randn(*shape, generator=gen).to(dtype) for shape in ((9, H), (V, H), (V,)))
    top = torch.randn(9, V, generator=gen).log_softmax(-1).topk(4, -1)
    valid = torch.arange(4) < torch.tensor([4, 4, 1, 3, 2, 4, 4, 1, 2])[:, None]
    idx = torch.randint(teachers, (9,), generator=gen) if teachers > 1 else None
    return (hidden, weight, bias), (0.8, 5.0, torch.where(valid, top.indices, -1), top.values, valid), idx


def candidates_step(beta, tail, teachers, dtype=torch.float32, exact=False):
    leaves, rest, idx = candidates(teachers, dtype)
    leaves = [(x.double() if exact else x).requires_grad_() for x in leaves]
    if exact:
        rest = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in rest]
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double) if exact else nullcontext():
        found = async_trainer._chunked_jsd_loss(*leaves, *rest, beta, 0.9, tail, idx, teachers, 4)
        found[0].backward()
    return [*found, *(x.grad for x in leaves)]


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("beta", BETAS)
def test_async_distillation(beta, tail):
    for teachers in (1, 3):
        with trl.installed():
            ours = candidates_step(beta, tail, teachers)
        stock = candidates_step(beta, tail, teachers)
        for i, values in enumerate(zip(ours, stock, candidates_step(beta, tail, teachers, exact=True), strict=True)):
            assert_no_farther(*values, size=max(1.0, float(values[2].detach().abs().max())), what=str(i))


def test_async_distillation_in_bfloat16():
    with trl.installed():
        ours = candidates_step(0.0, True, 1, dtype=torch.bfloat16)
    exact = candidates_step(0.0, True, 1, dtype=torch.bfloat16, exact=True)
    for mine, truth in zip(ours, exact, strict=True):
        error = (mine.double() - truth).abs().max().item()
        assert error <= torch.finfo(torch.bfloat16).eps * max(1.0, truth.abs().max().item())


# -------------------------------------------------------------------- the loss from two logits tensors


def logits(dtype=torch.float32, flat=False):
    gen = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(B, T + 1, V, generator=gen).mul(1.5).to(dtype)[:, :-1] for _ in range(2))
    labels = torch.randint(V, (B, T), generator=gen)
    labels[0, 3:], labels[1] = -100, -100
    if flat:
        return student.reshape(-1, V), teacher.reshape(-1, V), labels.reshape(-1)
    return student, teacher, labels


def gradient_of(function, student, *args, **kwargs):
    """Return the value of a function and its gradient by the student's logits, weighted by token."""
    leaf = student.clone().requires_grad_()
    value = function(leaf, *args, **kwargs)
    weight = torch.linspace(0.5, 1.5, max(1, value.numel()), dtype=torch.float64).view(value.shape)
    (value * weight).sum().backward()
    return value.detach(), leaf.grad


def compare_logits(owner, name, *args, bound=None, **kwargs):
    """Compare a function of TRL with tokfuse's and with itself in float64."""
    with trl.installed():
        ours = gradient_of(getattr(owner, name), *args, **kwargs)
    stock_function = getattr(owner, name)
    stock = gradient_of(stock_function, *args, **kwargs)
    wide = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
    exact = gradient_of(stock_function, *wide, **kwargs)
    for mine, theirs, truth, what in zip(ours, stock, exact, ("value", "gradient"), strict=True):
        if bound is None:
            assert_no_farther(mine, theirs, truth, what=what)
        else:
            assert (mine.double() - truth).abs().max().item() <= bound * truth.abs().max().item(), what
    return ours, stock


TRAINERS = (GKDTrainer, GOLDTrainer, IWOPDTrainer)
REDUCTIONS = (
    {"num_items_in_batch": 11},
    {"num_items_in_batch": torch.tensor(4.0), "reduction": "none"},
    {"reduction": "batchmean"},
    {"reduction": "sum"},
    {"reduction": "mean"},
)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("beta", BETAS)
def test_generalized_jsd(trainer, beta):
    student, teacher, labels = logits()
    for labelled in (labels, None, torch.full_like(labels, -100)):
        for options in REDUCTIONS if labelled is None or (labelled != -100).any() else REDUCTIONS[:4]:
            compare_logits(
                trainer, "generalized_jsd_loss", student, teacher, labelled, beta=beta, temperature=0.7, **options
            )
    compare_logits(trainer, "generalized_jsd_loss", *logits(flat=True)[:2], beta=beta)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generalized_jsd_in_sixteen_bits(dtype):
    student, teacher, labels = logits(dtype)
    ours, _ = compare_logits(
        GKDTrainer, "generalized_jsd_loss", student, teacher.float(), labels, beta=0.3, bound=torch.finfo(dtype).eps
    )
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        (GKDTrainer, {"reduction": "none"}),
        (GOLDTrainer, {"logits_are_probs": True}),
        (IWOPDTrainer, {"top_k": 4}),
        (IWOPDTrainer, {"top_k": 4, "add_tail": False, "beta": 1.0}),
    ],
)
def test_what_generalized_jsd_leaves_to_trl(trainer, options):
    student, teacher, labels = logits()
    if "logits_are_probs" in options:
        student, teacher = student.softmax(-1), teacher.softmax(-1)
    ours, stock = compare_logits(trainer, "generalized_jsd_loss", student, teacher, labels, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))  # bitwise: TRL's own code ran


def test_a_teacher_that_requires_grad_is_left_to_trl():
    student, teacher, labels = logits()
    teacher.requires_grad_()
    with trl.installed():
        GKDTrainer.generalized_jsd_loss(student, teacher, labels).backward()
    assert teacher.grad.any()


@pytest.mark.parametrize("module", [sdft_trainer, sdpo_trainer])
@pytest.mark.parametrize("alpha", BETAS)
def test_self_distillation(module, alpha):
    student, teacher, _ = logits()
    full = "compute_full_logit_self_distillation_loss"
    compare_logits(module, full, student, teacher, distillation_alpha=alpha)
    for tail in (False, True):
        top = {"distillation_topk": 6, "distillation_alpha": alpha, "distillation_add_tail": tail}
        compare_logits(module, "compute_topk_self_distillation_loss", student, teacher, **top)


def test_float64_reference_is_the_formula():
    p, q = (torch.randn(4, 9, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    for beta in BETAS:
        stock = GKDTrainer.generalized_jsd_loss(p, q, beta=beta, reduction="sum")
        torch.testing.assert_close(exact_divergence(p, q, beta).sum(), stock)


# ------------------------------------------------------------------------------------- trainers

COMMON = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "save_strategy": "no",
    "seed": 3,
    "lr_scheduler_type": "constant",
    "optim": "sgd",  # Adam amplifies rounding if a gradient is nearly 0
    "learning_rate": 0.3,
    "max_grad_norm": 0.0,
}


def distillation(tmp_path, model=None, extra=None, **options):
    given = {**COMMON, "max_completion_length": 6, "temperature": 0.9, **options}
    return DistillationTrainer(
        model=tiny_grpo.load() if model is None else model,
        teacher_model=tiny_grpo.load(tied=False),
        args=DistillationConfig(str(tmp_path), **given),
        train_dataset=tiny_grpo.prompts(),
        eval_dataset=tiny_grpo.prompts(4),
        processing_class=tiny_grpo.tokenizer(),
        **(extra or {}),
    )


def gkd(tmp_path, **options):
    from datasets import Dataset

    tokenizer = tiny_grpo.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    words = [f"w{i} w{i + 1}" for i in range(8)]
    chats = [
        [{"role": "user", "content": w}, {"role": "assistant", "content": " ".join([w] * (1 + i % 3))}]
        for i, w in enumerate(words)
    ]
    given = {**COMMON, "max_new_tokens": 5, "temperature": 0.9, "max_length": 32, **options}
    return GKDTrainer(
        model=tiny_grpo.load(),
        teacher_model=tiny_grpo.load(tied=False),
        args=GKDConfig(str(tmp_path), **given),
        train_dataset=Dataset.from_dict({"messages": chats}),
        processing_class=tokenizer,
    )


def history(trainer):
    """Return every logged number, without times."""
    return [
        {name: x for name, x in row.items() if not any(clock in name for clock in CLOCKS)}
        for row in trainer.state.log_history
    ]


def trained(make, path, **options):
    def run():
        trainer = make(path, **options)
        trainer.train()
        return trainer

    ours, stock, exact = three(run)
    runs = [history(x) for x in (ours, stock, exact)]
    assert len({tuple(tuple(row) for row in run) for run in runs}) == 1, "the same names at every step"
    assert {"loss", "grad_norm"} <= set(runs[0][0])
    for name in {name: None for row in runs[2] for name in row}:
        figures = [torch.tensor([row[name] for row in run if name in row]).double() for run in runs]
        assert_no_farther(*figures, size=max(1.0, float(figures[2].abs().max())), what=name)
    weights = [torch.cat([x.flatten() for x in run.model.state_dict().values()]) for run in (ours, stock, exact)]
    assert_no_farther(*weights, what="weights")
    return stock


@pytest.mark.parametrize("beta", BETAS)
def test_distillation_trainer(beta, tmp_path):
    trained(distillation, tmp_path, beta=beta)


def test_distillation_trainer_with_lora(tmp_path):
    from peft import LoraConfig

    extra = {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"], r=4)}
    trained(distillation, tmp_path, beta=0.3, extra=extra)


def test_distillation_trainer_evaluates(tmp_path):
    def run():
        trainer = distillation(tmp_path, beta=0.3, per_device_eval_batch_size=4)
        torch.manual_seed(5)
        found = {k: x for k, x in trainer.evaluate().items() if not any(clock in k for clock in CLOCKS)}
        assert all(p.grad is None for p in trainer.model.parameters())
        return found

    ours, stock, exact = three(run)
    assert ours.keys() == stock.keys() == exact.keys() and "eval_entropy" in ours
    for name in ours:
        assert_no_farther(ours[name], stock[name], exact[name], size=max(1.0, abs(exact[name])), what=name)


@pytest.mark.parametrize(("beta", "lmbda"), [(0.0, 0.0), (0.5, 1.0), (1.0, 0.0)])
def test_gkd_trainer(beta, lmbda, tmp_path):
    trained(gkd, tmp_path, beta=beta, lmbda=lmbda)


# ------------------------------------------------------------------------------ install, describe


def test_uninstall_restores_functions_and_staticmethods():
    owners = [(part.owner(), part.attribute) for part in trl_distillation.PARTS]
    assert None not in [owner for owner, _ in owners]
    stock = [inspect.getattr_static(owner, name) for owner, name in owners]
    trl.install()
    ours = [inspect.getattr_static(owner, name) for owner, name in owners]
    assert all(a is not b and type(a) is type(b) for a, b in zip(stock, ours, strict=True))
    trl.uninstall()
    assert all(inspect.getattr_static(*owner) is b for owner, b in zip(owners, stock, strict=True))


def test_describe_names_every_trainer_and_what_is_left_to_trl():
    text = trl.describe()
    for name in ("DistillationTrainer: linear_paired_divergence (cpu:", "GKDTrainer", "GOLDTrainer", "SDPOTrainer"):
        assert name in text
    assert "left to TRL" in text and "ServerDistillationTrainer" in text


@pytest.mark.parametrize(
    "op", ["distill_step", "linear_paired_divergence", "linear_token_stats", "paired_divergence", "token_stats"]
)
def test_each_loss_runs_its_op(op, monkeypatch):
    """Otherwise a comparison with TRL would also pass if TRL's code ran on both sides."""

    def called(*args, **kwargs):
        raise RuntimeError(op)

    monkeypatch.setattr(trl_distillation, op, called)
    student, teacher, labels = logits()
    alpha = {"distillation_alpha": 0.3}
    calls = {
        "distill_step": [lambda: step(heads(), beta=0.3)]
        + [lambda c=c: c.generalized_jsd_loss(student, teacher, labels) for c in TRAINERS],
        "linear_paired_divergence": [lambda: step(heads(dtype=torch.float16), beta=0.3)],
        "linear_token_stats": [lambda: candidates_step(0.0, True, 1)],
        "paired_divergence": [lambda: GKDTrainer.generalized_jsd_loss(student.half(), teacher.half(), labels)]
        + [
            lambda m=m: m.compute_full_logit_self_distillation_loss(student, teacher, **alpha)
            for m in (sdft_trainer, sdpo_trainer)
        ],
        "token_stats": [
            lambda m=m: m.compute_topk_self_distillation_loss(
                student, teacher, distillation_topk=3, distillation_add_tail=True, **alpha
            )
            for m in (sdft_trainer, sdpo_trainer)
        ],
    }
    with trl.installed():
        for call in calls[op]:
            with pytest.raises(RuntimeError, match=op):
                call()


def test_a_trainer_that_cannot_be_imported_is_skipped_and_named(monkeypatch):
    parts = [trl_distillation.PARTS[0]._replace(trainer="Other", module="trl.no_such_module")]
    monkeypatch.setattr(trl_distillation, "PARTS", parts)
    with trl.installed():
        assert "Other: not importable here" in trl.describe()
