"""Test `influence.capture` against per-sample gradients, projected by the same matrices, in float64.

Every situation of a trainer has one test: packed and padded batches, accumulation, checkpointing, autocast, frozen
weights, LoRA, shared weights, and the lm_head inside the ops from hidden states.
"""

import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
import transformers
from harness import host_backends
from tiny_llama import tiny_llama
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import tokfuse
from tokfuse import algorithms, influence
from tokfuse.algorithms.captured_layers import is_conv1d, sizes
from tokfuse.algorithms.captured_norms import norm_offset
from tokfuse.algorithms.captured_projection import Projection, seed_of
from tokfuse.integrations.trl_influence import CompletionInfluence
from tokfuse.runtime.core import dispatch

RANK, SEED = 4, 3
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def projected(name, module, gradient, rank=RANK, seed=SEED):
    """Return P_out G P_in^T of gradients (..., outputs, inputs), and P g of the gradients (..., size) of a norm."""
    if module.weight.dim() == 1:
        whole = Projection(module.weight.shape[0], rank * rank, seed_of(seed, name, "norm"), torch.device("cpu"))
        return gradient.double() @ (whole.matrix(torch.float64) * whole.factor).t()
    inputs, outputs = sizes(module)
    left, right = (
        Projection(size, rank, seed_of(seed, name, side), torch.device("cpu"))
        for size, side in ((outputs, "out"), (inputs, "in"))
    )
    out = (p.matrix(torch.float64) * p.factor for p in (left, right))
    first, second = out
    return first @ gradient.double() @ second.t()


def expected(model, names, losses):
    """Return the features of one backward per loss, (seqs, numbers). losses: functions without arguments."""
    rows = []
    modules = [model.get_submodule(name) for name in names]
    frozen = [not m.weight.requires_grad for m in modules]
    for module in modules:
        module.weight.requires_grad_()
    for loss in losses:
        grads = torch.autograd.grad(loss(), [m.weight for m in modules], allow_unused=True, materialize_grads=True)
        parts = []
        for name, module, grad in zip(names, modules, grads, strict=True):
            parts.append(projected(name, module, grad.t() if is_conv1d(module) else grad).flatten())
        rows.append(torch.cat(parts))
    for module, was in zip(modules, frozen, strict=True):
        module.weight.requires_grad_(not was)
    return torch.stack(rows)


def llama(**options):
    """Return a float64 model whose lm_head has its own weight, with dropout off."""
    model = tiny_llama()
    config = model.config
    config.tie_word_embeddings = False
    for key, value in options.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).double().eval()


def all_layers(model):
    return [*influence.layers(model), "lm_head"]


def tokens(seqs=3, length=6, seed=0):
    return torch.randint(1, 61, (seqs, length), generator=torch.Generator().manual_seed(seed))


def nll(model, ids, mask=None):
    """Return the sum of the NLL of each sequence, (seqs,)."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(ids.shape[0], -1)
    return (each if mask is None else each * mask[:, 1:]).sum(1)


def one_by_one(model, ids, loss=nll):
    return [lambda row=row: loss(model, row[None]).sum() for row in ids]


# ------------------------------------------------------------------------------------- layer kinds


class Kinds(torch.nn.Module):
    """A model with every kind of layer, one of which runs twice, and two that share their weight."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(10, 12)
        self.conv = Conv1D(9, 12)
        self.twice = torch.nn.Linear(9, 9, bias=False)
        self.tied = torch.nn.Linear(9, 9)
        self.other = torch.nn.Linear(9, 9)
        self.other.weight = self.tied.weight
        self.small = torch.nn.Linear(9, 3)
        self.pooled = torch.nn.Linear(3, 2)

    def forward(self, x):
        x = self.conv(torch.tanh(self.first(x)))
        x = self.twice(torch.tanh(self.twice(x)))
        x = torch.relu_(self.other(torch.tanh(self.tied(x))))  # in place on the output of a captured layer
        return self.pooled(self.small(x).mean(1))


def test_every_kind_of_layer_equals_its_gradients():
    torch.manual_seed(0)
    model, x = Kinds().double(), torch.randn(5, 4, 10, dtype=torch.float64)
    with influence.capture(model, rank=RANK, seed=SEED) as captured:
        model(x).square().sum().backward()
    assert captured.names == ["first", "conv", "twice", "tied", "small", "pooled"] and captured.seqs == 5
    want = expected(model, captured.names, [lambda r=r: model(r[None]).square().sum() for r in x])
    torch.testing.assert_close(captured.features, want, **TIGHT)
    assert captured.layer("small").shape == (5, 3, RANK) and captured.layer("pooled").shape == (5, 2, 3)
    grads = {name: module.weight.grad for name, module in model.named_modules() if hasattr(module, "weight")}
    with influence.capture(model, rank=RANK, seed=SEED):
        model.zero_grad()
        model(x).square().sum().backward()
    for name, grad in grads.items():  # the hooks change no gradient
        assert torch.equal(grad, model.get_submodule(name).weight.grad)


def test_a_whole_language_model_and_the_scores():
    model, ids = llama(), tokens()
    with influence.capture(model, rank=RANK, seed=SEED) as captured:
        nll(model, ids).sum().backward()
    assert captured.names == influence.layers(model)
    assert len(captured.names) == 2 * 9 + 1 and "model.norm" in captured.names
    want = expected(model, captured.names, one_by_one(model, ids))
    torch.testing.assert_close(captured.features, want, **TIGHT)
    torch.testing.assert_close(captured.scores(captured), influence.matrix(want))
    torch.testing.assert_close(captured.scores(cosine=False), want @ want.t())
    with influence.capture(model, rank=RANK, seed=SEED + 1) as other:
        nll(model, ids).sum().backward()
    with pytest.raises(ValueError, match="same layers, rank and seed"):
        captured.scores(other)
    assert not torch.allclose(captured.features, other.features)


def test_selection_methods_take_the_features_unchanged():
    model, ids = llama(), tokens(6)
    with influence.capture(model) as captured:
        nll(model, ids).sum().backward()
    train, valid = captured.features[:4], captured.features[4:]
    make = tokfuse.algorithms.make
    assert make("less", fraction=0.5).select([train], [valid]).shape == (2,)
    assert make("greats", k=2, lr=0.1).select(train, valid).shape == (2,)
    assert make("ugda").select(torch.rand(2, 4), [train], [valid]).shape == (1,)
    sigma = tokfuse.algorithms.curation.cures.rollout_sigma(
        train, torch.tensor([True, False, True, False]), torch.tensor([0, 0, 1, 1]), 2, torch.tensor([0.5, 0.5])
    )
    assert (sigma > 0).all()


# ------------------------------------------------------------------------------------------ default


def test_the_default_is_every_layer_but_the_head():
    model, ids = llama(), tokens()
    captures = {name: influence.capture(model, modules=name) for name in (None, "all")}
    with captures[None] as ordinary, captures["all"] as whole:
        nll(model, ids).sum().backward()
    assert ordinary.names == influence.layers(model) and whole.names == [*ordinary.names, "lm_head"]
    assert ordinary.rank == CompletionInfluence(validation=nll).rank == 16
    assert torch.equal(whole.features[:, : ordinary.features.shape[1]], ordinary.features)
    with influence.capture(model.model) as headless:  # a model without a head has nothing to leave out
        model.model(input_ids=ids).last_hidden_state.sum().backward()
    assert [f"model.{name}" for name in headless.names] == ordinary.names


class OtherHead(torch.nn.Module):
    """A model whose head has another name, and cannot be captured."""

    def __init__(self):
        super().__init__()
        self.body, self.unembed = quantised()[0], quantised()[1]

    def get_output_embeddings(self):
        return self.unembed


@pytest.mark.filterwarnings("ignore")
def test_a_head_of_another_name_is_left_out_and_not_refused():
    model = OtherHead()
    with influence.capture(model) as captured:
        model.body(torch.ones(2, 3, 4)).sum().backward()
    assert captured.names == ["body"]
    with pytest.raises(ValueError, match="unembed: quantised"):
        influence.capture(model, modules="all")
    with pytest.raises(ValueError, match='"all" has the lm_head'):
        influence.capture(torch.nn.ModuleDict({"lm_head": torch.nn.Linear(8, 30)}))


# -------------------------------------------------------------------------------------------- norms


class Shifted(torch.nn.RMSNorm):
    """Gemma's norm, which multiplies by 1 + w."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, 1.0 + self.weight, 1e-6)


class Normed(torch.nn.Module):
    """Norms of tokens, of heads in both orders of the axes, and one that runs twice."""

    def __init__(self):
        super().__init__()
        self.first, self.twice = torch.nn.LayerNorm(8), torch.nn.RMSNorm(8, eps=1e-6)
        self.shifted = Shifted(8)
        self.heads, self.turned = torch.nn.LayerNorm(4, bias=False), torch.nn.RMSNorm(4, eps=1e-6)
        torch.manual_seed(4)
        for p in self.parameters():
            torch.nn.init.normal_(p)

    def forward(self, x, turn=True):
        x = self.twice(torch.tanh(self.twice(torch.tanh(self.first(x)))))
        x = self.heads(torch.tanh(self.shifted(x)).unflatten(-1, (2, 4)))
        return self.turned(torch.tanh(x).transpose(-3, -2)) if turn else x

    def gradients(self, losses, rank=RANK):
        """Return the features of one backward per loss, (losses, numbers)."""
        names = [name for name, module in self.named_children() if module is not self.turned or losses[0]()[1]]
        weights = [self.get_submodule(name).weight for name in names]
        rows = [torch.autograd.grad(loss()[0], weights) for loss in losses]
        parts = zip(names, zip(*rows, strict=True), strict=True)
        return torch.cat([projected(n, self.get_submodule(n), torch.stack(g), rank) for n, g in parts], 1)


def test_every_kind_of_norm_equals_its_gradients():
    model, x = Normed().double(), torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for rank in (RANK, 2):  # 4 numbers of a weight of 8 are a projection
        with influence.capture(model, rank=rank, seed=SEED) as captured:
            model(x).square().sum().mul(2).backward()
            for part in (x[:1], x[1:]):
                model(part).sin().sum().backward()
        found = [(model(r[None]).square().sum() * 2, True) for r in x]
        found += [(model(r[None]).sin().sum(), True) for r in x]
        want = model.gradients([lambda pair=pair: pair for pair in found], rank)
        torch.testing.assert_close(captured.features, want, **TIGHT)
        assert captured.layer("first").shape == (6, min(8, rank * rank))


def test_a_batch_without_sequences_has_no_rows():
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.LayerNorm(5))
    with influence.capture(model) as captured:
        model(torch.zeros(0, 2, 7)).sum().backward()
    assert captured.features.shape == (0, 5 * 7 + 5)


@pytest.mark.parametrize(("name", "call"), [("capture", influence.capture), ("layers", influence.layers)])
def test_a_model_that_is_no_module_is_refused(name, call):
    with pytest.raises(TypeError, match=rf"^influence\.{name}: model must be a torch.nn.Module; got str\."):
        call("model")


def test_norms_of_packed_sequences_and_of_a_mask():
    model, x = Normed().double(), torch.randn(9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    cu, names = torch.tensor([0, 2, 2, 9], dtype=torch.int32), ["first", "twice", "shifted", "heads"]

    def loss(rows):
        return model(rows, turn=False).sin().sum()

    def want(parts):
        return model.gradients([lambda p=p: (loss(p), False) for p in parts])

    for rows in (x, x[None]):
        with influence.capture(model, rank=RANK, modules=names, seed=SEED) as captured:
            captured.batch(cu_seqlens=cu)
            loss(rows).backward()
        torch.testing.assert_close(captured.features, want([x[:2], x[:0], x[2:]]), **TIGHT)
    padded = torch.stack([x[:4], x[4:8]])
    padded[:, 3] = torch.nan
    mask = torch.tensor([[True, True, True, False]] * 2)
    with influence.capture(model, rank=RANK, modules=names, seed=SEED) as captured:
        captured.batch(mask=mask)
        loss(padded).backward()
    torch.testing.assert_close(captured.features, want([x[:3], x[4:7]]), **TIGHT)
    with influence.capture(model) as captured, pytest.raises(ValueError, match="turned must be of the 8 tokens"):
        captured.batch(mask=mask)
        model(padded)


def test_a_norm_whose_weight_multiplies_by_zero_is_refused():
    with pytest.raises(ValueError, match="the weight of 0 must be without entries that multiply by 0"):
        influence.capture(torch.nn.Sequential(Shifted(4).requires_grad_(False), torch.nn.Linear(4, 2)).apply(less_one))
    model = torch.nn.Sequential(Shifted(4), torch.nn.Linear(4, 2))
    torch.nn.init.zeros_(model[0].weight)  # as Gemma starts: it multiplies by 1
    influence.capture(model)


def less_one(module):
    if isinstance(module, Shifted):
        torch.nn.init.constant_(module.weight, -1.0)


KINDS_OF_NORMS = (
    (torch.nn.LayerNorm(8), 0.0),
    (torch.nn.LayerNorm(8, bias=False).bfloat16(), 0.0),
    (torch.nn.RMSNorm(8), 0.0),
    (Shifted(8), 1.0),
    (Shifted(8).bfloat16(), 1.0),
    (torch.nn.LayerNorm(8, elementwise_affine=False), None),
    (torch.nn.LayerNorm((2, 4)), None),
    (torch.nn.BatchNorm1d(8), None),
    (torch.nn.GroupNorm(2, 8), None),
    (torch.nn.PReLU(8), None),
    (torch.nn.Embedding(3, 8), None),
)


@pytest.mark.parametrize("module, offset", KINDS_OF_NORMS)
def test_norms_are_recognised_by_what_they_compute(module, offset):
    assert norm_offset(module) == offset


def test_the_moment_of_a_norm_is_exact():
    model, gen = torch.nn.Sequential(torch.nn.RMSNorm(6)).double(), torch.Generator().manual_seed(3)
    x, v = torch.randn(2, 3, 6, generator=gen, dtype=torch.float64), torch.rand(6, generator=gen, dtype=torch.float64)
    weight = model[0].weight
    optimizer = torch.optim.AdamW([weight], betas=(0.9, 0.99))
    for state, share in (({"exp_avg_sq": v, "step": torch.tensor(7.0)}, 1 - 0.99**7), ({"variance": v}, 1.0)):
        optimizer.state[weight] = state
        with influence.capture(model, optimizer=optimizer) as captured:
            model(x).sin().sum().backward()
        want = [torch.autograd.grad(model(r[None]).sin().sum(), weight)[0] / (v / share).sqrt() for r in x]
        torch.testing.assert_close(captured.features, torch.stack(want), **TIGHT)


def test_a_norm_whose_output_changes_in_place_is_no_wrong_feature():
    model, x = torch.nn.Sequential(torch.nn.LayerNorm(6), torch.nn.ReLU(inplace=True)), torch.randn(2, 3, 6)
    with influence.capture(model), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(x).sum().backward()


def test_checkpointing_frees_the_outputs_of_norms():
    model = torch.nn.Sequential(torch.nn.RMSNorm(6), torch.nn.Linear(6, 6))
    outputs = []
    model[0].register_forward_hook(lambda *given: outputs.append(weakref.ref(given[2])))
    x = torch.randn(2, 3, 6, requires_grad=True)
    with influence.capture(model) as captured:
        loss = checkpoint(model, x, use_reentrant=False).sum()
        assert outputs[0]() is None
        loss.backward()
    assert len(outputs) == 2 and (captured.layer("0") != 0).all()


# -------------------------------------------------------------------------------------- situations


def test_padding_adds_nothing_on_either_side():
    model, ids = llama(), tokens(2, 4)
    pad = torch.zeros(2, 3, dtype=torch.int64)
    want = expected(model, all_layers(model), one_by_one(model, ids))
    for order in ((ids, pad), (pad, ids)):
        whole = torch.cat(order, 1)
        mask = (whole > 0).long()
        with influence.capture(model, rank=RANK, modules="all", seed=SEED) as captured:
            nll_of_answers(model, whole, mask).backward()
        torch.testing.assert_close(captured.features, want, rtol=1e-9, atol=1e-11)


def nll_of_answers(model, ids, mask):
    """Return the NLL of tokens whose predecessor counts, with positions that padding does not shift."""
    position = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=position).logits[:, :-1]
    each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (each * (mask[:, 1:] * mask[:, :-1]).flatten()).sum()


def test_a_mask_excludes_tokens_that_are_not_finite():
    torch.manual_seed(0)
    model, x = torch.nn.Linear(6, 5).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    want = expected(model, [""], [lambda r=r: model(r[:2]).sum() for r in x])
    x[:, 2] = torch.nan
    with influence.capture(model, rank=RANK, seed=SEED) as captured:
        captured.batch(mask=torch.tensor([[True, True, False]] * 2))
        model(x).sum().backward()
    torch.testing.assert_close(captured.features, want, **TIGHT)
    with influence.capture(model) as captured, pytest.raises(ValueError, match="6 tokens"):
        captured.batch(mask=torch.ones(2, 2, dtype=torch.bool))
        model(x)


class Block(torch.nn.Module):
    """Attention over packed sequences, given by cu_seqlens."""

    def __init__(self):
        super().__init__()
        self.qk, self.v, self.out = torch.nn.Linear(8, 16), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x, cu_seq_lens_q=None):
        part = torch.searchsorted(cu_seq_lens_q, torch.arange(x.shape[-2]), right=True)
        q, k = self.qk(x).chunk(2, -1)
        score = (q @ k.mT).masked_fill(part[:, None] != part, float("-inf"))
        return self.out(score.softmax(-1) @ self.v(x))


@pytest.mark.parametrize("shape", [(9, 8), (1, 9, 8)])
def test_packed_sequences(shape):
    torch.manual_seed(0)
    model, x = Block().double(), torch.randn(9, 8, dtype=torch.float64)
    cu = torch.tensor([0, 2, 2, 9], dtype=torch.int32)  # one is empty

    def run(rows):
        return model(rows, torch.tensor([0, rows.shape[-2]], dtype=torch.int32)).square().sum()

    parts = [x[a:b] for a, b in zip(cu.tolist(), cu.tolist()[1:], strict=False)]
    want = expected(model, ["qk", "v", "out"], [lambda p=p: run(p) for p in parts])
    for told in (True, False):
        with influence.capture(model, rank=RANK, seed=SEED) as captured:
            if told:
                captured.batch(cu_seqlens=cu)
                model(x.view(shape), cu).square().sum().backward()
            else:  # as transformers passes it
                model(x.view(shape), cu_seq_lens_q=cu).square().sum().backward()
        torch.testing.assert_close(captured.features, want, **TIGHT)


def test_accumulation_gives_one_row_per_sequence_in_order():
    model, ids = llama(), tokens(5)
    want = expected(model, all_layers(model), one_by_one(model, ids))
    with influence.capture(model, rank=RANK, modules="all", seed=SEED) as captured:
        for part in (ids[:2], ids[2:3]):
            nll(model, part).sum().backward()
        with torch.no_grad():
            model(ids)  # adds no rows
        losses = [nll(model, part).sum() for part in (ids[3:4], ids[4:])]  # two forwards, then two backwards
        for loss in reversed(losses):
            loss.backward()
    torch.testing.assert_close(captured.features, want, **TIGHT)
    with influence.capture(model.model, rank=RANK, seed=SEED) as captured:  # without a forward of `model` itself
        for part in (ids[:2], ids[2:]):
            h = part
            h = model.model.embed_tokens(h)
            for layer in model.model.layers:
                h = layer(h, position_embeddings=model.model.rotary_emb(h, torch.arange(6)[None]))
            h.square().sum().backward()
    assert captured.seqs == 5


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, ids = llama(), tokens()
    want = expected(model, all_layers(model), one_by_one(model, ids))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train().enable_input_require_grads()
    runs = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: runs.append(1))
    with influence.capture(model, rank=RANK, modules="all", seed=SEED) as captured:
        nll(model, ids).sum().backward()
    assert len(runs) == 2
    torch.testing.assert_close(captured.features, want, **TIGHT)


@pytest.mark.parametrize("layer", [torch.nn.Linear(6, 6), torch.nn.LayerNorm(6)])
def test_reentrant_checkpointing_of_two_open_forwards_is_refused(layer):
    model = torch.nn.Sequential(layer)
    x = torch.randn(2, 3, 6, requires_grad=True)
    with influence.capture(model, rank=RANK), pytest.raises(RuntimeError, match="use_reentrant=False"):
        first = [torch.nn.Sequential(model)(x).sum() for _ in range(1)]
        other = checkpoint(model, x, use_reentrant=True).sum()
        model(x)
        (first[0] + other).backward()


def test_autocast_is_close_to_float32():
    model, ids = llama().float(), tokens()
    want = expected(model, all_layers(model), one_by_one(model, ids))
    with influence.capture(model, rank=RANK, modules="all", seed=SEED) as captured:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nll(model, ids).sum()
        loss.backward()
    assert captured.features.dtype == torch.float32
    cosine = F.cosine_similarity(captured.features.double(), want)
    assert (cosine > 0.999).all()


def test_float32_sums_are_within_rounding():
    model, ids = llama(), tokens()
    want = expected(model, all_layers(model), one_by_one(model, ids))
    model = model.float()
    with influence.capture(model, rank=RANK, modules="all", seed=SEED) as captured:
        nll(model, ids).sum().backward()
    error = (captured.features.double() - want).norm(dim=1) / want.norm(dim=1)
    assert (error < 2e-6).all()


def test_frozen_weights_count_if_their_output_has_a_gradient():
    model, ids = llama(), tokens()
    want = expected(model, all_layers(model), one_by_one(model, ids))
    model.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_()
    with influence.capture(model, rank=RANK, modules="all", seed=SEED) as captured:
        nll(model, ids).sum().backward()
    torch.testing.assert_close(captured.features, want, **TIGHT)
    assert model.lm_head.weight.grad is None


def test_layers_without_a_gradient_are_named():
    model, ids = llama(), tokens()
    model.requires_grad_(False)
    model.model.layers[1].requires_grad_()
    with pytest.warns(RuntimeWarning, match="layers.0.self_attn.q_proj"), influence.capture(model) as captured:
        nll(model, ids).sum().backward()
    assert (captured.layer("model.layers.0.mlp.up_proj") == 0).all()
    assert (captured.layer("model.layers.1.mlp.down_proj") != 0).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with influence.capture(model, modules=["*.layers.1.*"]) as captured:
            nll(model, ids).sum().backward()
    assert len(captured.names) == 9 and captured.features.shape[0] == 3


def test_lora_matrices_are_layers():
    peft = pytest.importorskip("peft", reason="needs the group `hosts`")
    config = peft.LoraConfig(r=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model, ids = peft.get_peft_model(llama(), config).double().eval(), tokens()
    with influence.capture(model, rank=RANK, modules="trainable", seed=SEED) as captured:
        nll(model, ids).sum().backward()
    assert len(captured.names) == 8 and all("lora_" in name for name in captured.names)
    want = expected(model, captured.names, one_by_one(model, ids))
    torch.testing.assert_close(captured.features, want, **TIGHT)
    assert len(influence.layers(model)) == 14 + 8 + 5


# --------------------------------------------------------------------------------------------- Adam


def rank_one(shape, gen):
    return torch.rand(shape[0], 1, generator=gen, dtype=torch.float64) * torch.rand(
        1, shape[1], generator=gen, dtype=torch.float64
    )


@pytest.mark.parametrize("kind", ["exp_avg_sq", "row_var", "exp_avg_sq_row"])
def test_a_rank_one_moment_is_preconditioned_exactly(kind):
    torch.manual_seed(0)
    model, x = Kinds().double(), torch.randn(5, 4, 10, dtype=torch.float64)
    names, gen = ["first", "conv", "twice", "tied", "small", "pooled"], torch.Generator().manual_seed(5)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    moments = {}
    for name in names:
        weight = model.get_submodule(name).weight
        v = moments[name] = rank_one(weight.shape, gen)
        rows, columns = v.mean(1), v.mean(0)
        state = {
            "exp_avg_sq": {"exp_avg_sq": v, "step": torch.tensor(7.0)},
            "row_var": {"row_var": rows[:, None], "col_var": columns[None]},
            "exp_avg_sq_row": {"exp_avg_sq_row": rows, "exp_avg_sq_col": columns},
        }[kind]
        optimizer.state[weight] = state
    correction = (1 - 0.99**7) if kind == "exp_avg_sq" else 1.0
    with influence.capture(model, rank=RANK, seed=SEED, optimizer=optimizer) as captured:
        model(x).square().sum().backward()
    for name in names:
        module, rows = model.get_submodule(name), []
        for r in x:
            (grad,) = torch.autograd.grad(model(r[None]).square().sum(), module.weight)
            grad = grad / (moments[name] / correction).sqrt()
            rows.append(projected(name, module, grad.t() if is_conv1d(module) else grad))
        torch.testing.assert_close(captured.layer(name), torch.stack(rows), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="second moment of every captured weight"):
        influence.capture(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_moments_of_a_real_optimizer_are_replaced_by_their_rank_one_form():
    model, ids = llama(), tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(3):
        optimizer.zero_grad()
        nll(model, tokens(4, 8, seed=10 + step)).mean().backward()
        optimizer.step()
    with influence.capture(model, rank=RANK, seed=SEED, optimizer=optimizer) as captured:
        nll(model, ids).sum().backward()
    for name in captured.names:
        weight, rows = model.get_submodule(name).weight, []
        v = optimizer.state[weight]["exp_avg_sq"] / (1 - 0.999**3)
        if v.dim() == 2:  # the moment of a norm is a vector, which needs no other form
            v = v.mean(1, keepdim=True) * v.mean(0, keepdim=True) / v.mean()
        for loss in one_by_one(model, ids):
            rows.append(projected(name, model.get_submodule(name), torch.autograd.grad(loss(), weight)[0] / v.sqrt()))
        torch.testing.assert_close(captured.layer(name), torch.stack(rows), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------- the lm_head inside an op


def head_case(model, ids):
    """Return hidden states of the predicting positions, packed, with targets and offsets."""
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
    cu = torch.arange(ids.shape[0] + 1, dtype=torch.int32) * (ids.shape[1] - 1)
    return hidden, ids[:, 1:].flatten(), cu


def policy(model, ids):
    hidden, target, cu = head_case(model, ids)
    step = tokfuse.policy_step(
        hidden=hidden, weight=model.lm_head.weight, target=target, old_logp=None, cu_seqlens=cu,
        advantage=torch.ones(target.shape[0], dtype=hidden.dtype), objective=tokfuse.Objective(),
    )  # fmt: skip
    return 4.0 * step.loss


def statistics(model, ids, **options):
    hidden, target, _ = head_case(model, ids)
    return -4.0 * tokfuse.linear_token_stats(hidden, model.lm_head.weight, target, **options).logp.sum()


def top(model, ids):
    return statistics(model, ids, top_k=2)


def distilled(model, ids):
    hidden, target, _ = head_case(model, ids)
    teacher = torch.zeros(target.shape[0], 61, dtype=hidden.dtype)
    teacher[torch.arange(target.shape[0]), target] = 60.0  # one-hot: the forward KL is the NLL
    return (
        4.0
        * tokfuse.distill_step(
            hidden=hidden, weight=model.lm_head.weight, teacher_logits=teacher, kind="kl_forward"
        ).loss
    )


def distilled_with_policy(model, ids):
    """The NLL of a token by the divergence or, if its weight is 0, by the policy gradient."""
    hidden, target, cu = head_case(model, ids)
    teacher = torch.zeros(target.shape[0], 61, dtype=hidden.dtype)
    teacher[torch.arange(target.shape[0]), target] = 60.0
    of_policy = (torch.arange(target.shape[0]) % 2).to(hidden.dtype)
    step = tokfuse.distill_step(
        hidden=hidden, weight=model.lm_head.weight, teacher_logits=teacher, kind="kl_forward", coef=1.0 - of_policy,
        target=target, advantage=of_policy, objective=tokfuse.Objective(), cu_seqlens=cu,
    )  # fmt: skip
    return 4.0 * step.loss


def divergence(model, ids):
    hidden, target, _ = head_case(model, ids)
    teacher = torch.zeros(target.shape[0], 61, dtype=hidden.dtype)
    teacher[torch.arange(target.shape[0]), target] = 60.0
    out = tokfuse.linear_paired_divergence(hidden, model.lm_head.weight, teacher_logits=teacher, kind="kl_forward")
    return 4.0 * out.divergence.sum()


def at_ids(model, ids):
    """The forward KL at one id, to which the teacher gives all its mass, is the NLL."""
    hidden, target, cu = head_case(model, ids)
    method = algorithms.make("forward_kl_topk", k=1, loss_min=None)
    plan = method.objective(algorithms.DistillationBatch(num_tokens=target.shape[0], cu_seqlens=cu))
    step = algorithms.top_k_step(
        method, plan, hidden=hidden, weight=model.lm_head.weight, ids=target[:, None],
        teacher_logp_at=torch.zeros(target.shape[0], 1), normalizer=1.0,
    )  # fmt: skip
    return 4.0 * step.loss


def smoothed(model, ids):
    """Label smoothing runs in its own backward. A share of 1e-12 does not change the loss."""
    hidden, target, _ = head_case(model, ids)
    given = {"label_smoothing": 1e-12, "reduction": "sum"}
    return 4.0 * tokfuse.linear_cross_entropy(hidden, model.lm_head.weight, target, **given)


HEADS = (policy, statistics, top, at_ids, smoothed, distilled, distilled_with_policy, divergence)
FUSED = {f.__name__: f for f in HEADS}


@pytest.mark.parametrize("backend", host_backends("policy_step_hidden"))
@pytest.mark.parametrize("op", FUSED.values(), ids=FUSED)
def test_the_head_inside_an_op_equals_the_layer(op, backend):
    dtype = torch.float64 if backend == "reference" else torch.float32
    model, ids = llama().to(dtype), tokens()
    names = all_layers(model)
    # LlamaRMSNorm rounds to float32, which a factor of 4 does not change.
    want = 4.0 * expected(model, names, one_by_one(model, ids))
    sizes_of_ids = torch.arange(4, dtype=torch.int32) * 5
    with dispatch.backend(backend):
        for frozen in (False, True):
            model.lm_head.weight.requires_grad_(not frozen)
            with influence.capture(model, rank=RANK, modules="all", seed=SEED) as captured:
                if op not in (policy, distilled_with_policy, at_ids):
                    captured.batch(head_cu_seqlens=sizes_of_ids)
                op(model, ids).backward()
            error = (captured.features.double() - want).norm(dim=1) / want.norm(dim=1)
            assert (error < (1e-9 if backend == "reference" else 5e-6)).all(), error


def test_preference_step_equals_the_layer():
    model, ids = llama().float(), tokens(4)
    found = []
    for fused in (True, False):
        with influence.capture(model, rank=RANK, modules="all", seed=SEED) as captured:
            captured.batch(head_cu_seqlens=torch.arange(5, dtype=torch.int32) * 5)
            hidden, target, cu = head_case(model, ids)
            batch = tokfuse.algorithms.PreferenceBatch(
                num_tokens=20, cu_seqlens=cu, pairs=torch.tensor([[0, 1], [3, 2]]), ref_logp=torch.zeros(20)
            )
            given = {"hidden": hidden, "weight": model.lm_head.weight} if fused else {"logits": model.lm_head(hidden)}
            loss = tokfuse.algorithms.make("dpo")
            tokfuse.algorithms.preference_step(loss=loss, batch=batch, target=target, **given).loss.backward()
        found.append(captured.features)
    assert found[0].shape[0] == 4
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6 * float(found[1].abs().max()))


def test_the_head_of_a_frozen_body_starts_its_batch():
    head, hidden = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(8, 30, bias=False)}), torch.randn(7, 8)
    target, cu = torch.arange(7), torch.tensor([0, 3, 7], dtype=torch.int32)
    with influence.capture(head, rank=RANK, modules="all", seed=SEED) as captured:
        with pytest.raises(ValueError, match=r"captured\.batch\(cu_seqlens"):
            tokfuse.linear_token_stats(hidden, head["lm_head"].weight, target)
        captured.batch(cu_seqlens=cu)
        tokfuse.linear_token_stats(hidden, head["lm_head"].weight, target).logp.sum().backward()
    want = F.one_hot(target, 30) - (hidden @ head["lm_head"].weight.t()).softmax(1)
    want = torch.stack([want[a:b].t() @ hidden[a:b] for a, b in ((0, 3), (3, 7))]).detach()
    want = projected("lm_head", head["lm_head"], want).float()
    torch.testing.assert_close(captured.layer("lm_head"), want, rtol=1e-5, atol=1e-5)


def test_calls_that_hide_the_head_are_refused():
    model, ids = llama().float(), tokens()
    with influence.capture(model, rank=RANK, modules="all") as captured:
        hidden, target, cu = head_case(model, ids)
        weight = model.lm_head.weight
        with pytest.raises(ValueError, match="head_cu_seqlens"):
            tokfuse.linear_token_stats(hidden[:7], weight, target[:7])
        with pytest.raises(ValueError, match="3 sequences"):
            tokfuse.policy_step(
                hidden=hidden, weight=weight, target=target, old_logp=None, advantage=torch.ones(15),
                objective=tokfuse.Objective(), cu_seqlens=torch.tensor([0, 15], dtype=torch.int32),
            )  # fmt: skip
        with torch.no_grad():
            tokfuse.linear_token_stats(hidden[:7], weight, target[:7])  # no gradient, nothing to capture
        captured.batch(head_cu_seqlens=cu)
        nll(model, ids).sum().backward()


# ------------------------------------------------------------------------------------- the refusals


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(4, 2)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        rows = x.reshape(-1, 4)
        best = self.gate(rows).argmax(1)
        parts = torch.stack([e(rows[best == i]).sum(0) for i, e in enumerate(self.experts)])
        return parts.sum(0) + self.gate(rows).sum()


def quantised():
    from torch.ao.nn.quantized.dynamic import Linear

    return torch.nn.Sequential(torch.nn.Linear(4, 4), Linear(4, 4))


def mixtral():
    config = transformers.MixtralConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


BLOCK = [f"self_attn.{x}_proj" for x in "qkvo"] + ["input_layernorm", "post_attention_layernorm"]
MIXTRAL = [*(f"model.layers.0.{x}" for x in BLOCK), "model.norm"]
REFUSED = {
    "mixtral": (mixtral, "model.layers.0.mlp.experts: expert", MIXTRAL),
    "experts": (Experts, "experts.0: expert .its tokens carry no sequence.", ["gate"]),
    "quantised": (quantised, "quantised or unknown linear layer Linear", ["0"]),
    "attention": (lambda: torch.nn.MultiheadAttention(4, 2), "weight that its parent multiplies itself", None),
    "lazy": (lambda: torch.nn.LazyLinear(3), "lazy layer without a size", None),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_layers_that_cannot_be_captured_are_named_at_entry(case):
    make, text, others = case
    model = make()
    with pytest.raises(ValueError, match=text) as error:
        influence.capture(model)
    assert "tokfuse.influence.layers(model)" in str(error.value)
    names = influence.layers(model)
    assert names == (others or [])
    if others:
        with influence.capture(model, modules=names) as captured:
            assert captured.names == others


def test_the_gate_of_a_mixture_sees_flattened_tokens():
    torch.manual_seed(0)
    model, x = Experts().double(), torch.randn(2, 3, 4, dtype=torch.float64)
    want = expected(model, ["gate"], [lambda r=r: model(r[None]).sum() for r in x])
    with influence.capture(model, rank=RANK, modules=["gate"], seed=SEED) as captured:
        captured.batch(cu_seqlens=torch.tensor([0, 3, 6], dtype=torch.int32))
        model(x).sum().backward()
    torch.testing.assert_close(captured.features, want, **TIGHT)
    with (
        influence.capture(model, modules=["gate"]) as captured,
        pytest.raises(ValueError, match="belong to no sequence"),
    ):
        captured.batch(cu_seqlens=torch.tensor([0, 3, 6], dtype=torch.int32))
        model(x)
        model.gate(x[0, :1])


def test_wrong_arguments_are_refused():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    for options in (
        {"rank": 0},
        {"seed": True},
        {"modules": "0"},
        {"modules": ["1"]},
        {"modules": [0]},
        {"modules": 3},
    ):
        with pytest.raises(ValueError, match="influence.capture"):
            influence.capture(model, **options)
    with pytest.raises(ValueError, match="optimizer must be an optimizer with its state; got str"):
        influence.capture(model, optimizer="adam")
    with influence.capture(model) as captured:
        model(torch.ones(2, 3)).sum().backward()
        with pytest.raises(TypeError, match="cu_seqlens must be a torch.Tensor; got list"):
            captured.batch(cu_seqlens=[0, 2])
    with pytest.raises(TypeError, match="torch.nn.Module"):
        influence.capture([model])
    with pytest.raises(ValueError, match="not compiled"):
        influence.capture(torch.compile(model))
    with pytest.raises(ValueError, match="Use DistributedDataParallel"):
        influence.capture(torch.nn.DataParallel(model))
    with pytest.raises(ValueError, match="a layer to capture"):
        influence.capture(torch.nn.ReLU())
    context = influence.capture(model)
    with pytest.raises(ZeroDivisionError), context:  # an error is not hidden by the warning
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="already open"):
        context.__enter__()
    assert not model[0]._forward_hooks and not model._forward_pre_hooks


# ----------------------------------------------------------------------------------- the projections


@pytest.mark.parametrize("size", [5, 16, 17, 576, 1536])
def test_a_projection_keeps_inner_products_as_well_as_gaussian_numbers(size):
    """The Kronecker structure costs nothing: same mean, and the spread of independent Gaussian entries or less."""
    gen = torch.Generator().manual_seed(size)
    x, y = torch.randn(2, size, generator=gen, dtype=torch.float64)
    y = y + x
    x[: size // 8] *= 10.0  # a few large entries, as hidden states have
    found = {"signs": [], "gauss": []}
    for seed in range(600):
        p = Projection(size, 8, seed, torch.device("cpu"))
        m = p.matrix(torch.float64) * p.factor
        assert m.shape == (min(8, size), size) and seed_of(1, "a", "in") != seed_of(1, "a", "out")
        gauss = torch.randn(8, size, generator=gen, dtype=torch.float64) / 8**0.5
        for name, matrix in (("signs", m), ("gauss", gauss)):
            found[name].append((matrix @ x) @ (matrix @ y))
    signs, gauss = (torch.stack(x) - x_y for x, x_y in zip(found.values(), [x @ y] * 2, strict=True))
    if size <= 8:
        assert (signs.abs() < 1e-9).all()
    assert signs.mean().abs() <= 5 * signs.std() / 600**0.5 + 1e-9
    assert signs.std() <= 1.15 * gauss.std()
