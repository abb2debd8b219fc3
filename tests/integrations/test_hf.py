"""Test tokfuse.integrations.hf against transformers: loss, gradients, statistics, packed forward."""

import copy
import functools
import importlib
import inspect
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("peft", reason="needs the group `hosts`")
pytest.importorskip("transformers", reason="needs the group `hosts`")

import transformers
from harness import compare
from host_parity import assert_no_farther
from tiny_hf import (
    MODELS,
    B,
    H,
    L,
    V,
    assert_same,
    batch,
    float64_head,
    float64_linear,
    float64_loss,
    make,
    run,
    run_exactly,
)

import tokfuse
from tokfuse.integrations import hf, hf_forward, hf_packed, hosts
from tokfuse.runtime.lm_head import cpu_head

# ---------------------------------------------------------------------------------- patched forward


@pytest.mark.parametrize("kind", MODELS)
def test_every_supported_head(kind):
    model = make(kind)
    theirs, exact = run(model), run_exactly(model)
    with hf.installed(model):
        mine = run(model)
    assert mine[0].logits is None
    assert_same(mine, theirs, exact)


def test_bias_normalizer_and_shifted_labels():
    model = make()
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, V))
    more = {"num_items_in_batch": torch.tensor(37)}
    theirs, exact = run(model, **more), run_exactly(model, **more)
    with hf.installed(model):
        assert_same(run(model, **more), theirs, exact)
        given = batch()
        shifted = torch.nn.functional.pad(given.pop("labels"), (0, 1), value=-100)[:, 1:]
        out = model(**given, shift_labels=shifted, **more)
    assert_no_farther(out.loss, theirs[0].loss, exact[0].loss)


@pytest.mark.parametrize(("more", "times"), [({}, 1), ({"token_stats": True}, 2)], ids=["loss", "statistics"])
def test_the_loss_alone_computes_its_logits_once(more: dict[str, bool], times: int, monkeypatch):
    """The gradients come from the forward. Statistics get theirs in the backward, which needs the logits again."""
    rows, logits = [], cpu_head.Head.logits

    def counted(self, hidden, buffer, start):
        rows.append(hidden.shape[0])
        return logits(self, hidden, buffer, start)

    monkeypatch.setattr(cpu_head.Head, "logits", counted)
    model = make()
    with tokfuse.backend("cpu"), hf.installed(model):
        model(**batch(), **more).loss.backward()
    assert sum(rows) == times * int((batch()["labels"][:, 1:] != -100).sum())


def test_statistics_beside_the_loss():
    model = make()
    labels = batch()["labels"][:, 1:]
    with float64_head(model):
        logp = (model(**batch()).logits[:, :-1] / 0.7).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    with hf.installed(model, temperature=0.7):
        out = model(**batch(), token_stats=True)
    rows = labels != -100
    chosen = logp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    compare(out["logp"], chosen.masked_fill(~rows, 0), atol=2e-6)
    compare(out["entropy"], entropy.masked_fill(~rows, 0), atol=2e-6)
    out["entropy"].sum().backward()
    assert model.lm_head.weight.grad.any()


def test_without_labels_the_forward_is_the_models_own():
    model = make()
    ids = batch()["input_ids"]
    before, text = model(ids).logits, model.generate(ids, max_new_tokens=3, do_sample=False)
    with hf.installed(model):
        assert torch.equal(model(ids).logits, before)
        assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), text)


def test_no_label_at_all_is_a_differentiable_zero():
    model = make()
    given = {**batch(), "labels": torch.full((B, L), -100)}
    with hf.installed(model):
        loss = model(**given).loss
    loss.backward()
    assert loss.item() == 0.0
    assert not any(p.grad.any() for p in model.parameters())


def test_install_is_idempotent_and_uninstall_restores():
    model = make()
    kind = type(model)
    hf.uninstall(model)
    hf.install(model)
    patched = type(model)
    hf.install(model)
    assert type(model) is patched and issubclass(patched, kind) and "with tokfuse" in hf.describe(model)
    assert str(patched) == str(kind) and "forward" not in vars(model)
    hf.uninstall(model)
    assert type(model) is kind and hf.STATE not in vars(model)
    assert "without tokfuse" in hf.describe(model)


def test_another_install_replaces_the_options():
    model = make()
    hf.install(model)
    one = run(model)[0].loss
    hf.install(model, temperature=0.5)
    with hf.installed(make(), temperature=0.5):
        assert run(model)[0].loss != one


def test_a_patch_of_the_instance_is_not_hidden():
    model = make()
    model.forward = functools.partial(type(model).forward, model)
    with pytest.raises(
        ValueError, match=r"model.forward must be the forward of the model's class .*; got an attribute"
    ):
        hf.install(model)


def test_a_model_of_a_trl_trainer():
    """SFTTrainer and the others call add_fused_lm_head, and then score with fused_lm_head=True."""
    utils = pytest.importorskip("trl.trainer.utils", reason="needs the group `hosts`")
    from tokfuse.integrations import trl

    model = make()
    hf.install(model)
    with pytest.raises(
        ValueError, match=r"integrations.hf: the model of a TRL trainer .*tokfuse.integrations.trl.install"
    ):
        utils.add_fused_lm_head(model)
    assert "forward" not in vars(model)
    with trl.installed():
        utils.add_fused_lm_head(model)
        out = model(**batch(), fused_lm_head=True)
    assert_no_farther(out.loss, *(run(make())[0].loss, run_exactly(make())[0].loss), what="loss")
    hf.uninstall(model)
    assert model(input_ids=batch()["input_ids"]).logits is not None
    after = make()
    utils.add_fused_lm_head(after)
    with pytest.raises(ValueError, match=r"a function of trl.trainer.utils. Use tokfuse.integrations.trl.install"):
        hf.install(after)


def trainer_of(model, path, **options):
    args = transformers.TrainingArguments(
        str(path),
        per_device_train_batch_size=1,
        max_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    rows = [{k: v[i] for k, v in batch().items()} for i in range(B)]
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions)
        return {}

    trainer = transformers.Trainer(model, args, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics)
    return trainer, seen


def test_trainer_in_bfloat16_then_uninstall(tmp_path):
    """accelerate wraps the forward and does not unwrap it."""
    model = make()
    with hf.installed(model):
        trainer_of(model, tmp_path, bf16=True)[0].train()
        assert "forward" in vars(model)
    assert model(**batch()).logits is not None and not hf.is_installed(model)
    with hf.installed(model):  # and again, below the wrapper
        assert model(**batch()).logits is None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_evaluation_has_predictions(temperature, tmp_path):
    model = make()
    trainer, seen = trainer_of(model, tmp_path)
    theirs = trainer.evaluate()
    with hf.installed(model, temperature=temperature):
        mine = trainer.evaluate()
        with torch.no_grad():
            small = model.eval()(**batch(), skip_logits=True)
            assert small.logits is None and model(**batch(), token_stats=True).logits is None
            assert model(**batch()).loss.item() == pytest.approx(small.loss.item(), rel=1e-5)
    np.testing.assert_array_equal(seen[1], seen[0])
    assert (mine["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)) == (temperature == 1.0)
    with hf.installed(model, eval_logits=False), torch.no_grad():
        assert model(**batch()).logits is None


def deep(model, path):
    return copy.deepcopy(model)


def average(model, path):
    ema = torch.optim.swa_utils.AveragedModel(model, avg_fn=lambda old, new, count: 2 * new)
    ema.update_parameters(model)  # the first update copies
    ema.update_parameters(model)
    return ema.module


def saved(model, path):
    torch.save(model, path / "model.pt")
    return torch.load(path / "model.pt", weights_only=False)


def replica(model, path):
    """Return the replica that DataParallel makes, whose parameters are copies with a gradient to the original."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")

    def copies(tensors, devices, detach=False):
        return [[x.clone() for x in tensors]]

    with mock.patch.object(replicate, "_broadcast_coalesced_reshape", copies):
        (made,) = replicate.replicate(model, [0])
    return made


@pytest.mark.parametrize("duplicate", [deep, average, saved, replica])
def test_a_copy_computes_with_its_own_weights(duplicate, tmp_path):
    model = make()
    hf.install(model, temperature=0.8)
    twin = duplicate(model, tmp_path)
    assert "with tokfuse" in hf.describe(twin)
    with torch.no_grad():
        for x in (*model.parameters(), *model.buffers()):
            if x.is_floating_point():
                x.fill_(float("nan"))  # nothing of the original enters the copy
    loss = twin(**batch()).loss
    plain = make()
    if duplicate is average:
        with torch.no_grad():
            for x in plain.parameters():
                x.mul_(2)
    with hf.installed(plain, temperature=0.8):
        expected, grads = run(plain)
    assert loss.isfinite() and torch.equal(loss, expected.loss)
    loss.backward()
    if duplicate is replica:  # gradients flow through the copied parameters to the original's
        assert model.lm_head.weight.grad is not None
    else:
        assert all(torch.equal(p.grad, grads[name]) for name, p in twin.named_parameters())
        assert all(p.grad is None for p in model.parameters())
        hf.uninstall(twin)
        assert type(twin) is type(make()) and hf.is_installed(model)


@pytest.mark.parametrize("more", [{"logits_to_keep": 3}, {"return_dict": False}, {"output_router_logits": True}])
def test_a_forward_option_that_is_not_honoured_is_refused(more):
    model = make()
    with hf.installed(model), pytest.raises(ValueError, match=rf"integrations.hf: {next(iter(more))} "):
        model(**batch(), **more)
    model.config.return_dict = False
    with hf.installed(model), pytest.raises(ValueError, match=r"return_dict must be True .*; got False"):
        model(**batch())


@pytest.mark.parametrize("shape", [(B, L - 2), (B * L,)])
def test_labels_of_another_shape_are_refused(shape):
    model = make()
    given = {**batch(), "labels": torch.zeros(shape, dtype=torch.int64)}
    with hf.installed(model), pytest.raises(ValueError, match=r"labels must be of shape .* \(3, 8\)"):
        model(**given)


def test_labels_by_position_and_an_ignored_index():
    model, given = make(), batch()
    with hf.installed(model, temperature=0.5):
        named = model(**given)
        mine = model(given["input_ids"], given["attention_mask"], None, None, None, given["labels"])
        assert torch.equal(mine.loss, named.loss) and mine.logits is None
        assert model(**given, output_router_logits=None).loss == named.loss
        with pytest.raises(TypeError, match="multiple values|positional argument"):  # one more than the model takes
            model(*[None] * len(inspect.signature(model.forward).parameters), labels=given["labels"])
    given["labels"][given["labels"] == -100] = 7
    theirs = model(**given, ignore_index=7).loss.item()
    with hf.installed(model):
        assert model(**given, ignore_index=7).loss.item() == pytest.approx(theirs, rel=1e-6)
        with torch.no_grad():
            assert model.eval()(**given, ignore_index=7).loss.item() == pytest.approx(theirs, rel=1e-6)


class TwiceTheLoss(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.loss = 2 * output.loss
        return output


def test_a_forward_or_a_loss_of_the_user_is_not_replaced():
    model = make()
    model.__class__ = TwiceTheLoss
    with pytest.raises(ValueError, match=r"TwiceTheLoss.forward must be a forward of transformers .*; got a function"):
        hf.install(model)
    model = make()
    hf.install(model)
    model.loss_function = hf.causal_lm_loss
    assert model(**batch()).loss.isfinite()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    for train in (True, False):
        with pytest.raises(ValueError, match=r"model.loss_function must be transformers' ForCausalLMLoss .*<lambda>"):
            model.train(train)(**batch())


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_model(wrap):
    model = make()
    theirs = model(**batch()).loss.item()
    wrapped = wrap(model)
    with hf.installed(wrapped):
        assert hf.is_installed(model)
        mine = wrapped(**batch())
    assert mine.logits is None and mine.loss.item() == pytest.approx(theirs, rel=1e-6)
    assert type(model) is transformers.LlamaForCausalLM


@pytest.mark.parametrize("other", [None, "gpt2", torch.nn.Linear(2, 2)])
def test_what_is_no_model_of_transformers_is_refused(other):
    with pytest.raises(ValueError, match=r"model must be a causal language model .*; got a (NoneType|str|Linear)\. "):
        hf.install(other)


def test_older_versions_and_other_models_are_refused(monkeypatch):
    model = make()
    model.config.model_type = "mamba"
    with pytest.raises(ValueError, match=r"the model type must be one of the \d+ in .*SUPPORTED.*; got 'mamba'"):
        hf.install(model)
    monkeypatch.setattr(hosts.importlib.metadata, "version", lambda name: "4.57.1")
    with pytest.raises(ValueError, match=r"transformers must be 5\.\d+ to 5\.24 .* got 4\.57\.1"):
        hf.install(make())


def test_a_newer_version_warns(monkeypatch):
    monkeypatch.setattr(hosts.importlib.metadata, "version", lambda name: "5.99.0")
    hosts._warn_untested.cache_clear()
    model = make()
    with pytest.warns(UserWarning, match=r"tested with transformers 5\.\d+ to 5\.24; version 5\.99\.0 is installed"):
        hf.install(model)
    assert_same(run(model), run(make()), run_exactly(make()))


@pytest.mark.parametrize("use_cache", [False, True])
def test_the_keys_and_values_are_passed_on(use_cache):
    """With the name in the installed version: `past_key_values`, from 5.24 on `cache`."""
    model = make().eval()
    theirs = model(**batch(), use_cache=use_cache, output_hidden_states=True)
    with hf.installed(model):
        mine = model(**batch(), use_cache=use_cache, output_hidden_states=True)
    assert set(theirs) - set(mine) == {"logits"} and set(mine) <= set(theirs)
    (name,) = {"cache", "past_key_values"} & set(mine) or {"hidden_states"}
    assert (name == "hidden_states") == (not use_cache)
    if use_cache:
        assert mine[name].get_seq_length() == theirs[name].get_seq_length() == L


# ---------------------------------------------------------------------------------------- adapters


def lora(**options):
    from peft import LoraConfig, get_peft_model

    defaults = {"target_modules": ["lm_head"], "r": 3, "lora_alpha": 5, "init_lora_weights": False}
    torch.manual_seed(4)
    return get_peft_model(make(), LoraConfig(**{**defaults, **options}))


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"lora_dropout": 0.4}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
)
def test_adapters_of_the_head_are_computed(options):
    model = lora(**options).eval()  # no dropout
    theirs, exact = run(model), run_exactly(model)
    with hf.installed(model):
        assert_same(run(model), theirs, exact)
        with model.disable_adapter():
            off = model(**batch()).loss
        model.merge_adapter()
        merged = model(**batch()).loss
        model.unmerge_adapter()
    torch.testing.assert_close(merged, theirs[0].loss, rtol=1e-5, atol=1e-5)
    assert (off - theirs[0].loss).abs() > 1e-3


REFUSED_ADAPTERS = {"without dropout": {"lora_dropout": 0.4}, "plain LoRA": {"use_dora": True}}


@pytest.mark.parametrize("text", REFUSED_ADAPTERS)
def test_adapters_that_would_be_dropped_are_refused(text):
    model = lora(**REFUSED_ADAPTERS[text]).train()
    with pytest.raises(ValueError, match=f"adapter of lm_head must be {text}"):
        hf.head_of(model)


def test_other_adapters_and_heads_are_refused():
    from peft import IA3Config, get_peft_model

    config = IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    with pytest.raises(ValueError, match="must be a LoRA adapter of a linear layer"):
        hf.head_of(get_peft_model(make(), config))
    model = make()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"a floating torch.nn.Linear, .*; got Sequential"):
        hf.head_of(model)


@pytest.mark.parametrize("bias", [False, True])
def test_a_float32_head_over_a_bfloat16_model_is_not_rounded(bias):
    model = make().bfloat16()
    model.lm_head = torch.nn.Linear(H, V, bias=bias)  # float32
    with hf.installed(model):
        mine = run(model, token_stats=True)
    hidden = model.base_model(**{k: v for k, v in batch().items() if k != "labels"}).last_hidden_state[:, :-1]
    labels = batch()["labels"][:, 1:]
    logp = float64_linear(model.lm_head, hidden).log_softmax(-1)
    want = logp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(labels == -100, 0)
    compare(mine[0]["logp"], want, atol=2e-6)
    assert mine[1]["lm_head.weight"].dtype == torch.float32
    assert mine[1]["model.norm.weight"].dtype == torch.bfloat16


def test_autocast_computes_the_head_in_its_dtype():
    model = make()
    with torch.autocast("cpu", dtype=torch.bfloat16), hf.installed(model):
        mine, grads = run(model, token_stats=True)
        hidden = model.base_model(**{k: v for k, v in batch().items() if k != "labels"}).last_hidden_state[:, :-1]
    labels = batch()["labels"][:, 1:]
    logits = hidden.bfloat16().double() @ model.lm_head.weight.bfloat16().double().t()
    want = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    compare(mine["logp"], want.masked_fill(labels == -100, 0), atol=2e-6)
    assert grads["lm_head.weight"].dtype == torch.float32


class ScaledLinear(torch.nn.Linear):
    def forward(self, x):
        return 2.0 * super().forward(x)


@pytest.mark.parametrize("change", ["forward", "subclass", "hook", "pre-hook"])
def test_a_head_that_computes_something_else_is_refused(change):
    model = make()
    head = model.lm_head
    if change == "forward":
        head.forward = lambda x: torch.nn.functional.linear(x.float(), head.weight.float())
    elif change == "subclass":
        model.lm_head = ScaledLinear(H, V, bias=False)
    elif change == "hook":
        head.register_forward_hook(lambda module, args, output: 2.0 * output)
    else:
        head.register_forward_pre_hook(lambda module, args: args)
    with pytest.raises(ValueError, match=r"lm_head must be a linear layer without hooks and with torch's forward"):
        hf.install(model)


def test_a_head_placed_by_accelerate():
    from accelerate import cpu_offload, dispatch_model

    model = make()
    theirs, exact = run(model), run_exactly(model)
    placed = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with hf.installed(placed):
        assert_same(run(placed), theirs, exact)
    with pytest.raises(ValueError, match="lm_head must be"):
        hf.install(cpu_offload(make(), "cpu"))


def test_a_device_without_kernels_keeps_the_models_own_code(monkeypatch):
    """As on xpu, npu or mps, where the head would compute all logits in float64."""
    theirs = run(make())
    for module in (hf_forward, hosts):
        monkeypatch.setattr(module, "has_kernels", lambda op, device, dtype: False)
    model = make()
    hosts.tell_unchanged.cache_clear()
    with hf.installed(model), pytest.warns(UserWarning, match="no kernels for float32 on cpu: transformers's own code"):
        mine = run(model)
    assert torch.equal(mine[0].logits, theirs[0].logits) and torch.equal(mine[0].loss, theirs[0].loss)
    assert all(torch.equal(grad, mine[1][name]) for name, grad in theirs[1].items())
    with hf.installed(model, temperature=0.7), pytest.raises(ValueError, match="the model's device must be one that"):
        run(model)
    logits, labels = theirs[0].logits.detach(), batch()["labels"]
    got = hf.causal_lm_loss(logits, labels, V, num_items_in_batch=11)
    compare(got, float64_loss(logits, labels, num_items_in_batch=11), rtol=1e-6)


# ------------------------------------------------------------------------------ losses from logits


def test_loss_function_of_a_model():
    model = make("gemma2")
    theirs, exact = run(model), run_exactly(model)
    model.loss_function = hf.causal_lm_loss
    assert_same(run(model), theirs, exact)


def test_compute_loss_func_of_the_trainer(tmp_path):
    def train(**options):
        args = transformers.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=3,
            max_steps=2,
            logging_steps=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            optim="sgd",
            learning_rate=0.1,
        )
        rows = [{k: v[i] for k, v in batch().items()} for i in range(B)] * 2
        trainer = transformers.Trainer(make(), args, train_dataset=rows, **options)
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history[:-1]]

    def exact_loss(outputs, labels, num_items_in_batch=None):
        return float64_loss(outputs.logits, labels, num_items_in_batch=num_items_in_batch)

    ours = train(compute_loss_func=hf.compute_loss_func)
    assert_no_farther(ours, train(), train(compute_loss_func=exact_loss), what="losses")


def test_causal_lm_loss_normalizer_ignore_index_and_shift():
    logits = torch.randn(2, 5, V)
    labels = torch.randint(V, (2, 5))
    labels[0, 3] = 7
    got = hf.causal_lm_loss(logits, labels, V, num_items_in_batch=11, ignore_index=7)
    compare(got, float64_loss(logits, labels, num_items_in_batch=11, ignore_index=7), rtol=1e-6)
    shifted = hf.causal_lm_loss(logits, None, V, shift_labels=labels)
    compare(shifted, float64_loss(logits, None, shift_labels=labels), rtol=1e-6)
    with pytest.raises(ValueError, match="labels must be given without shift_labels"):
        hf.causal_lm_loss(logits, None, V)


# ------------------------------------------------------------------------------------------ packed


def packed(lengths):
    ids = torch.cat([batch()["input_ids"][i % B, :n] for i, n in enumerate(lengths)])
    return ids, torch.tensor([0, *lengths]).cumsum(0).int()


def test_packed_sequences_see_themselves_only():
    model = make()
    lengths = [5, 0, 9, 1, 7]
    ids, cu = packed(lengths)
    stats, borders = hf.packed_token_stats(model, ids, cu, temperature=0.8)
    alone = []
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        if end > start:
            one = ids[start:end]
            with float64_head(model):
                logp = (model(one[None]).logits[0, :-1] / 0.8).log_softmax(-1)
            alone.append(logp.gather(-1, one[1:, None]).squeeze(-1))
    compare(stats.logp, torch.cat(alone), atol=3e-6)
    assert borders.tolist() == [0, 4, 4, 12, 12, 18]
    assert hf.packed_route(model) == "padded"


def test_packed_with_flash_attention_passes_the_borders(monkeypatch):
    """transformers' flash_attention_2 reads the borders instead of a mask."""
    model = make()
    monkeypatch.setattr(hf_packed, "packed_route", lambda model: "flash_attention_2, no padding")
    seen = {}
    backbone = model.base_model.forward

    def record(**kwargs):
        seen.update(kwargs)
        return backbone(input_ids=kwargs["input_ids"], position_ids=kwargs["position_ids"])

    monkeypatch.setattr(model.base_model, "forward", record)
    ids, cu = packed([4, 6])
    assert hf.packed_hidden(model, ids, cu).shape == (10, H)
    assert seen["input_ids"].tolist() == [ids.tolist()]
    assert seen["position_ids"].tolist() == [[*range(4), *range(6)]]
    assert seen["cu_seq_lens_q"].tolist() == seen["cu_seq_lens_k"].tolist() == [0, 4, 10]
    assert seen["cu_seq_lens_q"].dtype == torch.int32
    assert (seen["max_length_q"], seen["max_length_k"]) == (6, 6)
    assert "attention_mask" not in seen


def test_a_policy_step_on_a_model():
    """head_of and packed_hidden give the inputs of policy_step. The result equals that of the model's own logits."""
    model = make("gemma2")
    ids, cu = packed([6, 8])
    hidden = hf.packed_hidden(model, ids, cu)
    step = tokfuse.policy_step(
        hidden=hidden[:-1],
        **hf.head_of(model).arguments(),
        target=ids[1:],
        old_logp=None,
        advantage=torch.linspace(-1, 1, len(ids) - 1),
        objective=tokfuse.Objective(),
    )
    with float64_head(model):
        logits = torch.cat([model(x[None]).logits[0] for x in (ids[:6], ids[6:])])[:-1]
    compare(step.stats.logp, logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0], atol=3e-6)
    step.loss.backward()
    assert model.get_input_embeddings().weight.grad.any()


def test_the_patch_belongs_to_one_model():
    first, second = make(), make()
    hf.install(first)
    assert "forward" not in vars(second)
    assert copy.deepcopy(second)(**batch()).logits is not None
    hf.uninstall(first)
