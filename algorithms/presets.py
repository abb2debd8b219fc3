"""Published configurations: `make(name, preset=...)`. "authors" is the configuration of the released code.

Each row names the file that the values were read from. A preset sets the loss; batch sizes, learning rates and the
number of responses are the trainer's.
"""

from tokfuse.algorithms.registry import add_preset
from tokfuse.algorithms.rules import ClipCov, DampRare, KLCov
from tokfuse.algorithms.standard import Overlong
from tokfuse.runtime.policy.objective import KL
from tokfuse.runtime.policy.shapes import LogClamp, PPOClip, TargetRatio

# -------------------------------------------------------------------------------- the methods of papers

_BAPO = "github.com/WooooDyy/BAPO recipe/bapo"
add_preset("bapo", "authors", f"{_BAPO}/config/bapo_trainer.yaml", form="code")
add_preset(
    "bapo",
    "authors_script",
    f"{_BAPO}/run_bapo_example.sh",
    form="code",
    target=0.5,
    low=(0.8, 0.95),
    high=(1.2, 2.0),
    step_low=0.05,
    step_high=0.1,
)
add_preset("bapo", "paper", "arXiv 2510.18927 section 5", form="paper")

_PIPO = "github.com/JacckMa/pipo_verl verl/trainer/config/experiments/math"
add_preset(
    "pipo",
    "authors",
    f"{_PIPO}/grpo_pipo.yaml, verl/trainer/config/algorithm.py",
    form="code",
    worsening=0.0,
    shape=PPOClip(dual=3.0),
    kl=KL(coef=0.001),
)
add_preset(
    "pipo",
    "authors_dapo",
    f"{_PIPO}/dapo_pipo.yaml",
    form="code",
    shape=PPOClip(low=0.2, high=0.28, dual=10.0),
    kl=KL(coef=0.001),
    skip_uniform=True,
)
add_preset(
    "pipo",
    "authors_gspo",
    f"{_PIPO}/gspo_pipo.yaml",
    form="code",
    level="sequence_token",
    aggregation="seq_mean_token_mean",
    shape=PPOClip(low=3e-4, high=4e-4),
)

_EPO = "github.com/WujiangXu/EPO README.md and examples/general_running_server.sh"
add_preset("epo", "authors", f"{_EPO}, sciworld", form="code", advantage="gae", alpha=0.05, max_turns=30)
add_preset("epo", "authors_alfworld", f"{_EPO}, alfworld", form="code", advantage="gae", alpha=0.1, max_turns=50)

_FLOW = "copy of the authors' script in zhmtike/flow_grpo (train_sd3_GRPO_Guard.py), config/base.py"
add_preset("grpo_guard", "authors", f"{_FLOW}, OCR", form="code", clip=2e-6, advantage_max=5.0)
add_preset("grpo_guard", "authors_pickscore", f"{_FLOW}, PickScore", form="code", clip=4e-6, advantage_max=5.0)

_LOPTI = "github.com/zhyang2226/AR-Lopti scripts/train_kklogic"
_LOPTI_CLIP = PPOClip(low=0.2, high=0.24, dual=10.0)
add_preset("lopti", "authors", f"{_LOPTI}_Lopti_4x80GB.sh", form="code", eta=0.4, shape=_LOPTI_CLIP, kl=KL(coef=0.001))
add_preset(
    "lopti",
    "authors_with_ar",
    f"{_LOPTI}_AR-Lopti_4x80GB.sh",
    form="code",
    eta=0.5,
    rules=(DampRare(alpha=0.3),),
    shape=_LOPTI_CLIP,
    kl=KL(coef=0.001),
)
add_preset(
    "ar", "authors", f"{_LOPTI}_AR_4x80GB.sh", rules=(DampRare(alpha=0.2),), shape=_LOPTI_CLIP, kl=KL(coef=0.001)
)

_NFT = "github.com/NVlabs/NFT"
add_preset("nft", "authors", f"{_NFT} train_7B.sh", normalize=1, neg_weight=1.0, level="token")
add_preset("nft", "authors_32b", f"{_NFT} train_32B.sh ('try 0.5 for 32B')", normalize=1, neg_weight=0.5, level="token")

_ENTROPY = "github.com/PRIME-RL/Entropy-Mechanism-of-RL recipe/dapo"
add_preset(
    "clip_cov",
    "authors",
    f"{_ENTROPY}/7b_clip_cov.sh and 32b_clip_cov.sh",
    shape=PPOClip(low=1.0, high=1.0),
    rules=(ClipCov(fraction=2e-4, low=1.0, high=5.0),),
    skip_uniform=True,
)
add_preset("kl_cov", "authors", f"{_ENTROPY}/7b_kl_cov.sh", rules=(KLCov(fraction=2e-3, coef=1.0),), skip_uniform=True)
add_preset(
    "kl_cov", "authors_32b", f"{_ENTROPY}/32b_kl_cov.sh", rules=(KLCov(fraction=2e-4, coef=1.0),), skip_uniform=True
)

add_preset(
    "gbpo",
    "authors",
    "github.com/bounded-ratio-rl/bounded_ratio_rl ttrl/Qwen2.5-Math/aime.sh, with verl's default kl_loss_coef",
    shape=TargetRatio(low=0.3, high=0.3),
    tau=1e-4,
    entropy_coef=0.005,
    kl=KL(coef=0.001),
)
add_preset(
    "adora",
    "authors",
    "github.com/ShadeCloak/ADORA ADORA/ADORA.sh",
    rule="llm",
    weight=0.1,
    length_limit=3900,
    kl=KL(coef=0.001),
)
add_preset(
    "dcpo_dist", "authors", "github.com/597358816/DCPO examples/qwen-math-7b-DCPO.sh", target_entropy=0.5, kl=None
)
add_preset("cdpo", "authors", "github.com/falonss703/VideoThinker, trainer and scripts", kl=KL(coef=-0.01, clamp=11.0))

_THOUGHTS = "github.com/interp-reasoning/thought-branches"
add_preset("thought_branches", "authors", _THOUGHTS, form="code")

# ------------------------------------------------------------------------------- the standard family

_OAT = "github.com/sail-sg/understand-r1-zero examples/qwen2.5-math-7b.sh"
add_preset("dr_grpo", "authors", _OAT, max_length=3000, kl=None)
add_preset(
    "gmpo", "authors", "github.com/callsys/GMPO scripts/qwen2.5-math-7b-gmpo.sh", shape=LogClamp(bound=0.4), kl=None
)

add_preset(
    "dapo",
    "authors",
    "verl recipe/dapo/run_dapo_qwen2.5_32b.sh",
    shape=PPOClip(low=0.2, high=0.28, dual=10.0),
    overlong=Overlong(max_length=20480, cache=4096),
    skip_uniform=True,
)
add_preset("gspo", "paper", "arXiv 2507.18071 section 5", shape=PPOClip(low=3e-4, high=4e-4))
add_preset("grpo", "paper", "arXiv 2402.03300 section 4.2", kl=KL(coef=0.04))
add_preset("dpo", "paper", "arXiv 2305.18290 section 6", beta=0.1)

# The scripts give gamma / beta; the margin is gamma.
_SIMPO = "github.com/princeton-nlp/SimPO training_configs"
for _name, _file, _beta, _ratio in (
    ("authors", "llama-3-8b-base-simpo.yaml", 2.0, 0.5),
    ("authors_llama3_instruct", "llama-3-8b-instruct-simpo.yaml", 2.5, 0.55),
    ("authors_llama3_instruct_v2", "llama-3-8b-instruct-simpo-v2.yaml", 10.0, 0.3),
    ("authors_mistral_base", "mistral-7b-base-simpo.yaml", 2.0, 0.8),
    ("authors_mistral_instruct", "mistral-7b-instruct-simpo.yaml", 2.5, 0.1),
    ("authors_gemma2", "gemma-2-9b-it-simpo.yaml", 10.0, 0.5),
):
    add_preset("simpo", _name, f"{_SIMPO}/{_file}", beta=_beta, margin=_beta * _ratio)
