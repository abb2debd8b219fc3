"""Test tokfuse.integrations.hf with a tiny model of every supported type: loss, gradients, output object.

Loss and gradients are no farther from the model with its head in float64 than the model's own. The vision-language
models run without an image.
"""

import contextlib
import dataclasses
import importlib
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers", reason="needs the group `hosts`")

import tiny_hf
import transformers

from tokfuse.integrations import hf

V, H, SIZES = tiny_hf.V, tiny_hf.H, tiny_hf.SIZES | {"attention_dropout": 0.0}
FULL = {"layer_types": ["full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "moe_intermediate_size": 8,
}
SHARED = {"shared_expert_intermediate_size": 8}
CAPPED = {"final_logit_softcapping": 0.8, "query_pre_attn_scalar": 8}
LAYERED = {"vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 4, "num_kv_shared_layers": 0}
GEMMA4 = CAPPED | FULL | LAYERED | {"global_head_dim": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 4, "mamba_n_groups": 1}
LATENT = {"head_dim": 4, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8}
LATENT |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
OLD = {"n_embd": H, "n_layer": 1, "n_head": 2, "d_model": H, "n_layers": 1, "n_heads": 2, "n_inner": 24}
OLD |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TEXT = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "aria_text": {},
    "bitnet": {},
    "bloom": {},
    "cohere2_moe": {"logit_scale": 0.3},
    "cwm": FULL,
    "deepseek_v2": ROUTED | LATENT,
    "deepseek_v3": ROUTED | LATENT,
    "doge": {},
    "dots1": ROUTED,
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 8, "moe_layer_start_index": 0},
    "exaone4": FULL,
    "exaone_moe": {},
    "falcon_h1": MAMBA | {"lm_head_multiplier": 0.4, "mamba_d_ssm": 16, "mamba_d_head": 4},
    "flex_olmo": {},
    "gemma3n_text": CAPPED
    | FULL
    | LAYERED
    | {"laurel_rank": 4, "intermediate_size": [24], "activation_sparsity_pattern": [0.0], "altup_num_inputs": 2},
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4,
    "glm": {},
    "glm4": {},
    "glm4_moe": ROUTED,
    "glm4_moe_lite": ROUTED | LATENT,
    "gpt2": OLD,
    "gpt_bigcode": OLD,
    "gpt_neox": {},
    "gpt_oss": FULL | LOCAL,
    "granite_swa": {"logits_scaling": 3.0},
    "granitemoe": LOCAL | {"logits_scaling": 3.0},
    "granitemoe_swa": LOCAL | {"logits_scaling": 3.0},
    "granitemoehybrid": LOCAL
    | MAMBA
    | {"logits_scaling": 3.0, "layer_types": ["attention"], "mamba_d_head": 8, "shared_intermediate_size": 8},
    "granitemoeshared": LOCAL | {"logits_scaling": 3.0, "shared_intermediate_size": 8},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "hy_v3": {},
    "hyperclovax": {"logits_scaling": 0.3},
    "jetmoe": {},
    "laguna": {},
    "lfm2": FULL,
    "lfm2_moe": FULL,
    "lfm3": FULL,
    "llama4_text": LOCAL | {"intermediate_size_mlp": 24},
    "mellum": EXPERTS,
    "mimo_v2_flash": {},
    "minimax": FULL | LOCAL,
    "minimax_m2": LOCAL,
    "ministral": FULL,
    "ministral3": {},
    "mixtral": LOCAL,
    "mpt": OLD,
    "nanochat": CAPPED,
    "nemotron": {},
    "nemotron_h": FULL,
    "olmo": {},
    "olmo3": FULL,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "persimmon": {},
    "phi": {"resid_pdrop": 0.0},
    "phimoe": LOCAL,
    "qwen2_moe": EXPERTS | SHARED,
    "qwen3_5_moe_text": EXPERTS | SHARED | FULL,
    "qwen3_5_text": FULL,
    "qwen3_moe": EXPERTS,
    "qwen3_next": EXPERTS | SHARED | FULL,
    "seed_oss": {"residual_dropout": 0.0},
    "solar_open": EXPERTS,
    "stablelm": {},
    "starcoder2": {"residual_dropout": 0.0},
    "vaultgemma": CAPPED | FULL,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
SMALL = {"hidden_size": H, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
QWEN = {"depth": 1, "hidden_size": H, "embed_dim": H, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": H}
QWEN |= {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0], "fullatt_block_indexes": [0]}
LLAMA = {"model_type": "llama"}
# type -> (options of the text config, options of the vision config)
VISION = {
    "gemma3": (CAPPED | {"model_type": "gemma3_text"}, SMALL | {"image_size": 16}),
    "gemma4": (GEMMA4 | {"model_type": "gemma4_text"}, SMALL | {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma3n": (TEXT["gemma3n_text"] | {"model_type": "gemma3n_text"}, {}),
    "glm4v": (ROPE, QWEN | {"image_size": 16}),
    "glm4v_moe": (ROUTED | {"head_dim": 16, "num_key_value_heads": 2} | ROPE, QWEN | {"image_size": 16}),
    "idefics3": (LLAMA, SMALL | {"image_size": 16}),
    "internvl": ({"model_type": "qwen2"}, SMALL | {"image_size": [16, 16], "patch_size": [4, 4]}),
    "llava": (LLAMA, SMALL | {"model_type": "clip_vision_model", "image_size": 16}),
    "mistral3": ({"model_type": "mistral"}, SMALL | {"model_type": "pixtral", "image_size": 16, "head_dim": 8}),
    "qwen2_5_vl": (ROPE, QWEN),
    "qwen2_vl": (ROPE, QWEN),
    "qwen3_5": (FULL, QWEN),
    "qwen3_5_moe": (EXPERTS | SHARED | FULL, QWEN),
    "qwen3_vl": (ROPE, QWEN),
    "qwen3_vl_moe": (ROPE | EXPERTS, QWEN),
    "smolvlm": (LLAMA, SMALL | {"image_size": 16}),
}


def make(kind):
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(0)
    if kind in TEXT:
        config = transformers.AutoConfig.for_model(kind, **SIZES | TEXT[kind])
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    text, vision = VISION[kind]
    more = {"mm_tokens_per_image": 4} if kind == "gemma3" else {"audio_config": None} if kind == "gemma4" else {}
    config = transformers.AutoConfig.for_model(kind, text_config=SIZES | text, vision_config=vision, **more)
    with contextlib.ExitStack() as stack:
        if kind == "gemma3n":  # its towers need timm, or have no small size; text does not pass through them
            towers = importlib.import_module("transformers.models.gemma3n.modeling_gemma3n").AutoModel
            own = towers.from_config

            def text_only(config):
                return own(config) if config.model_type == "gemma3n_text" else torch.nn.Identity()

            stack.enter_context(mock.patch.object(towers, "from_config", text_only))
        return transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def test_every_supported_type_is_tested():
    assert {*TEXT, *VISION, *tiny_hf.MODELS} == {*hf.SUPPORTED}
    assert not {*TEXT, *VISION} & {*tiny_hf.MODELS}


def test_the_documentation_lists_every_type():
    page = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    table = page.split("| family | model types |")[1].split("\n\n")[0]
    listed = [name for row in table.splitlines()[2:] for name in row.split("|")[2].strip().split(", ")]
    assert sorted(listed) == sorted(hf.SUPPORTED)
    assert f"{len(listed)} model types" in page


@pytest.mark.parametrize("kind", [*TEXT, *VISION])
def test_loss_and_gradients_are_those_of_the_model(kind):
    model = make(kind)
    assert model.config.model_type == kind
    given = {}
    if kind in ("gemma3", "gemma4"):
        given["token_type_ids" if kind == "gemma3" else "mm_token_type_ids"] = torch.zeros(tiny_hf.B, tiny_hf.L).long()
    if kind == "qwen3_next":  # transformers 5.0 needs a layer of linear attention for its cache
        given["use_cache"] = False
    own, exact = tiny_hf.run(model, **given), tiny_hf.run_exactly(model, **given)
    hf.install(model)
    mine = tiny_hf.run(model, **given)
    tiny_hf.assert_same(mine, own, exact)
    assert type(mine[0]) is type(own[0]) and mine[0].logits is None
    head = hf.head_of(model)
    rule = hf.SUPPORTED[kind]
    assert (head.softcap is not None, head.logit_scale != 1.0) == (rule.softcap, bool(rule.scale))
    for field in dataclasses.fields(own[0]):  # an output that the model gives is not lost
        assert (mine[0].get(field.name) is None) == (own[0].get(field.name) is None) or field.name == "logits"


def test_a_type_that_is_not_listed():
    config = transformers.AutoConfig.for_model("opt", **SIZES)
    with pytest.raises(ValueError, match=r"the model type must be one of the \d+ in .*SUPPORTED.*; got 'opt'"):
        hf.install(transformers.AutoModelForCausalLM.from_config(config))
