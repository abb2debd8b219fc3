"""Test tokfuse.integrations.trl: install, uninstall, and the head and the logits op compared with TRL's."""

import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("trl", reason="needs the group `hosts`")

import tiny_grpo
import trl.trainer.utils as utils
from host_parity import Float64Head, assert_no_farther, trl_in_float64
from trl import DPOConfig, DPOTrainer, GRPOTrainer, SFTConfig, SFTTrainer
from trl.kernels import ChunkedLogProbFunction

import tokfuse
from tokfuse.integrations import hosts, trl
from tokfuse.integrations import trl_seams as host
from tokfuse.integrations.trl_trainer import PolicyHead

SEAMS = ("_ChunkedLogProbFunction", "_use_triton", "_fused_logprob_entropy", "_supports_trl_loss_kernel")
N, H, V = 12, 16, 70


def seams():
    return [getattr(utils, name) for name in SEAMS]


# ------------------------------------------------------------------------------ install, uninstall


def test_install_is_idempotent_and_uninstall_restores_identity():
    stock = seams()
    host.uninstall()  # nothing was installed, so nothing happens
    host.install()
    ours = seams()
    assert all(a is not b for a, b in zip(stock, ours, strict=True))
    host.install()
    assert seams() == ours
    with host.installed():
        assert seams() == ours
    assert seams() == ours  # the inner context did not end the installation
    host.uninstall()
    assert all(a is b for a, b in zip(stock, seams(), strict=True))
    with host.installed():
        assert seams()[0] is not stock[0]
    assert all(a is b for a, b in zip(stock, seams(), strict=True))


def test_install_from_several_threads():
    before, interval = seams(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for step in (trl.install, trl.uninstall) * 25:
                for done in [pool.submit(step) for _ in range(4)]:
                    done.result()
    finally:
        sys.setswitchinterval(interval)
    assert seams() == before


def test_uninstall_refuses_to_undo_a_later_patch(monkeypatch):
    host.install()
    ours = utils._use_triton
    monkeypatch.setattr(utils, "_use_triton", len)
    with pytest.raises(ValueError, match=r"_use_triton must be the one that tokfuse installed"):
        host.uninstall()
    monkeypatch.setattr(utils, "_use_triton", ours)
    host.uninstall()


@pytest.mark.parametrize("version", ["0.24.0", "1.15.2"])
def test_a_version_that_breaks_is_refused(version, monkeypatch, tmp_path):
    monkeypatch.setattr(hosts.importlib.metadata, "version", lambda name: version)
    with pytest.raises(ValueError, match=rf"trl must be 1\.16\.\* .* got {version}"):
        host.install()
    with pytest.raises(ValueError, match="FusedGRPOTrainer: trl must be"):
        tiny_grpo.trainer(trl.FusedGRPOTrainer, tmp_path)


@pytest.mark.parametrize("version", ["1.17.0", "2.0.0rc1"])
def test_a_newer_version_is_installed_with_one_warning(version, monkeypatch):
    monkeypatch.setattr(hosts.importlib.metadata, "version", lambda name: version)
    hosts._warn_untested.cache_clear()
    stock = seams()
    sentence = rf"^tokfuse was tested with trl 1\.16\.\*; version {version} is installed\.$"
    with pytest.warns(UserWarning, match=sentence):
        host.install()
    assert seams()[0] is not stock[0]
    host.uninstall()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host.install()
    host.uninstall()


@pytest.mark.parametrize(
    ("version", "outcome"),
    [("1.9.7", "refused"), ("1.10.0", "silent"), ("1.11", "silent"), ("1.12.0.dev0", "silent"), ("1.13.1", "warns")]
    + [("0.99", "refused"), ("2.0", "warns"), ("from a branch", "refused")],
)
def test_a_range_of_versions(version, outcome, monkeypatch):
    monkeypatch.setattr(hosts.importlib.metadata, "version", lambda name: version)
    hosts._warn_untested.cache_clear()
    trainer = hosts.Host("trainer", (1, 10), (1, 12))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if outcome == "refused":
            with pytest.raises(ValueError, match=r"here: trainer must be 1\.10 to 1\.12 .*"):
                trainer.require("here")
        else:
            assert trainer.require("here") == version == trainer.require("here")
    assert len(caught) == (outcome == "warns")


def test_a_missing_host_is_named(monkeypatch):
    assert hosts.Host("no-such-trainer", (1, 0), (1, 2)).installed is None
    with pytest.raises(ValueError, match=r"no-such-trainer must be installed; got nothing"):
        hosts.Host("no-such-trainer", (1, 0), (1, 2)).require("here")


def test_describe_says_what_runs_where():
    assert "tokfuse not active" in host.describe()
    with host.installed(), tokfuse.backend("reference"):
        text = host.describe()
    assert "tokfuse installed" in text and "linear_token_stats (cpu: reference" in text


@pytest.mark.parametrize("device", ["xpu", "npu", "mps", "meta"])
def test_devices_without_kernels_are_listed(device, monkeypatch):
    assert not hosts.has_kernels("linear_token_stats", device, torch.bfloat16)
    monkeypatch.setattr(hosts, "devices", lambda: ["cpu", device])
    assert f"linear_token_stats (cpu: {hosts.runs_on('linear_token_stats', 'cpu', torch.bfloat16)}" in host.describe()
    assert f"{device}: unchanged)" in host.describe()


def test_a_device_without_kernels_keeps_trls_own_code(monkeypatch):
    """As on xpu, npu or mps, where linear_token_stats would compute all logits in float64."""
    for module in (host, hosts):
        monkeypatch.setattr(module, "has_kernels", lambda op, device, dtype: False)
    model = tiny_grpo.load()
    utils.add_fused_lm_head(model)
    ids = torch.randint(3, 40, (2, 9))

    def run():
        model.zero_grad()
        out = model(input_ids=ids, labels=ids, fused_lm_head=True)
        out.loss.backward()
        logits = torch.linspace(-2, 2, 2 * 9 * V).view(2, 9, V)
        return out.log_probs, model.lm_head.weight.grad, utils.selective_log_softmax(logits, ids)

    stock = run()
    with host.installed():
        assert not utils._use_triton(torch.device("cpu"))
        with pytest.warns(UserWarning, match="tokfuse has no kernels for float32 on cpu: TRL's own code runs there"):
            hosts.tell_unchanged.cache_clear()
            found = run()
    assert all(torch.equal(x, y) for x, y in zip(found, stock, strict=True))


def test_importing_the_adapter_imports_no_host():
    code = (
        "import sys, tokfuse.integrations.trl, tokfuse.integrations.hf;"
        "sys.exit(bool({'trl', 'transformers', 'peft'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], cwd="/").returncode == 0


# -------------------------------------------------------------------------------------------- head


def head_inputs(dtype=torch.float32, bias=True):
    gen = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, H, generator=gen).to(dtype) for n in (N, V))
    b = torch.randn(V, generator=gen).to(dtype) if bias else None
    target = torch.randint(V, (N,), generator=gen)
    return [x if x is None else x.requires_grad_() for x in (hidden, weight, b)], target


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_head_equals_trls(bias, softcap):
    results = []
    for apply in (host.token_head, ChunkedLogProbFunction.apply, Float64Head.apply):
        leaves, target = head_inputs(bias=bias)
        if apply is Float64Head.apply:
            leaves = [None if x is None else x.detach().double().requires_grad_() for x in leaves]
        out = apply(*leaves, target, 0.7, 32, softcap, 1.3, host.OUTPUTS)
        (out[0] * torch.linspace(-1, 1, N) + 0.3 * out[1]).sum().backward()
        results.append([*out, *(x.grad for x in leaves if x is not None)])
    assert [x.dtype for x in results[0]] == [x.dtype for x in results[1]]
    for mine, stock, exact in zip(*results, strict=True):
        assert_no_farther(mine, stock, exact)


def test_head_gives_what_is_asked_for():
    leaves, target = head_inputs()
    out = host.token_head(*leaves, target, 1.0, 32, outputs=("is_top1",))
    assert [x is None for x in out] == [False, True, True, True, False]
    with pytest.raises(ValueError, match=r"outputs must be among log_probs, .*; got 'varentropy'"):
        host.token_head(*leaves, target, 1.0, 32, outputs=("varentropy",))


def test_head_under_autocast_takes_its_dtype():
    leaves, target = head_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = ChunkedLogProbFunction.apply(*leaves, target, 1.0, 128)
        ours = host.token_head(*leaves, target, 1.0, 128)
    exact = host.token_head(*leaves, target, 1.0, 128)
    assert (ours[0] - exact[0]).abs().max() > 1e-4  # bfloat16 inputs
    assert (ours[0] - stock[0]).abs().max() < 0.1  # their logits are rounded to bfloat16
    ours[0].sum().backward()
    assert leaves[1].grad.dtype == torch.float32


def test_policy_head_is_connected_to_its_loss():
    """DDP searches the outputs of a forward for the parameters that will get a gradient."""
    leaves, target = head_inputs()
    head = PolicyHead(
        {"old_logp": None, "advantage": torch.ones(N), "objective": tokfuse.Objective(), "normalizer": "batch"}
    )
    logp, *_ = head.apply(*leaves, target, 1.0, 128, None, 1.0, ("log_probs", "entropy"))
    logp.sum().backward(retain_graph=True)  # has no separate gradient
    assert not leaves[1].grad.any()
    head.step.loss.backward()
    assert leaves[1].grad.any()


def test_only_labelled_rows_reach_the_head():
    """TRL scores every position on a CPU. With tokfuse the prompt's rows are not computed."""
    model = tiny_grpo.load()
    utils.add_fused_lm_head(model)
    ids = torch.randint(3, 40, (2, 9))
    labels = ids.clone()
    labels[:, :6] = -100
    labels[1] = -100  # and a row without any label
    seen = []
    counting = host.Head(lambda h, *rest: seen.append(len(h)) or host.token_head(h, *rest))
    with host.rebound(counting):
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    stock = model(input_ids=ids, labels=labels, fused_lm_head=True)
    with trl_in_float64():
        exact = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert seen == [3]
    assert_no_farther(out.log_probs, stock.log_probs, exact.log_probs)
    with host.installed():
        nothing = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    nothing.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# --------------------------------------------------------------------------------------- logits op


@pytest.mark.parametrize("masked", [False, True])
def test_logits_op_equals_trls(masked):
    gen = torch.Generator().manual_seed(2)
    base = 3 * torch.randn(3, 5, V, generator=gen)
    index = torch.randint(V, (3, 5), generator=gen)
    row_mask = (torch.rand(3, 5, generator=gen) > 0.3) if masked else None

    def run(base=base):
        logits = base.clone().requires_grad_()
        logp, entropy = utils.selective_log_softmax_and_entropy(logits, index, temperature=0.8, row_mask=row_mask)
        alone = utils.selective_log_softmax(logits, index, row_mask=row_mask)
        ((logp + 0.5 * entropy + alone) * torch.arange(15.0).view(3, 5)).sum().backward()
        return logp, entropy, alone, utils.entropy_from_logits(logits), logits.grad

    with host.installed():
        ours = run()
    for mine, theirs, exact in zip(ours, run(), run(base.double()), strict=True):
        assert exact.dtype == torch.float64
        assert_no_farther(mine, theirs, exact)


def test_what_the_logits_op_does_not_take_stays_trls():
    logits = torch.randn(2, 3, V)
    several = torch.randint(V, (2, 3, 4))  # several tokens per position
    stock = utils.selective_log_softmax(logits, several)
    with host.installed():
        assert torch.equal(utils.selective_log_softmax(logits, several), stock)
        assert utils.selective_log_softmax(logits.double(), several[..., 0]).dtype == torch.float64
    assert not host.supports_logits(logits, several)
    assert not host.supports_logits(logits.double())
    assert not host.supports_logits(logits, several[..., 0], torch.ones(2))
    assert not host.supports_logits(logits.to("meta"))


# ---------------------------------------------------------------------------------------- trainers


def losses(trainer):
    trainer.train()
    keys = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "logits/chosen")
    return [{k: row[k] for k in keys if k in row} for row in trainer.state.log_history[:-1]]


def sft(tmp_path):
    from datasets import Dataset

    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{2 * i} w3 w4"} for i in range(8)]
    args, data = SFTConfig(str(tmp_path), **COMMON), Dataset.from_list(rows)
    return SFTTrainer(
        model=tiny_grpo.saved_model(), args=args, train_dataset=data, processing_class=tiny_grpo.tokenizer()
    )


def dpo(tmp_path):
    from datasets import Dataset

    rows = [{"prompt": f"w{i} w{i + 1}", "chosen": f" w{2 * i} w3", "rejected": f" w{i} w5 w6"} for i in range(8)]
    args, data = DPOConfig(str(tmp_path), **COMMON), Dataset.from_list(rows)
    return DPOTrainer(
        model=tiny_grpo.saved_model(), args=args, train_dataset=data, processing_class=tiny_grpo.tokenizer()
    )


COMMON = {
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "optim": "sgd",
    "learning_rate": 0.1,
    "gradient_checkpointing": False,
}
TRAINERS = {
    "grpo": lambda path: tiny_grpo.trainer(
        GRPOTrainer, path, beta=0.1, num_iterations=2, optim="sgd", learning_rate=0.3
    ),
    "sft": sft,
    "dpo": dpo,
}


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_follows(name, tmp_path, monkeypatch):
    stock = losses(TRAINERS[name](tmp_path))
    with trl_in_float64():
        exact = losses(TRAINERS[name](tmp_path))
    calls = []
    head = host.token_head
    monkeypatch.setattr(host, "token_head", lambda *a: calls.append(1) or head(*a))
    with host.installed():
        ours = losses(TRAINERS[name](tmp_path))
    assert calls, "the head was not used"
    assert len(ours) == len(stock) == len(exact) == 2
    assert "loss" in exact[0] and [row.keys() for row in ours] == [row.keys() for row in exact]
    for key in exact[0]:
        figures = ([row[key] for row in run] for run in (ours, stock, exact))
        assert_no_farther(*figures, what=key)
