"""Test TRL's default GRPO on SmolLM2-135M: stock, with install(), and FusedGRPOTrainer agree.

The reference is the stock trainer with its head and loss in float64. Loss, gradient norm, entropy, KL and metrics
must be no farther from it than those of the stock trainer, whose head rounds to float32.
"""

import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs the group `hosts`")
pytest.importorskip("gguf", reason="needs the group `demo`")

import tiny_grpo
from host_parity import FLOOR, trl_in_float64
from trl import GRPOConfig, GRPOTrainer

from tokfuse.integrations import trl as host

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from grpo_demo import model as loader

CLOCKS = ("time", "per_second", "runtime")
OPTIONS = {"default": {}, "kl, reused": {"beta": 0.04, "num_iterations": 2}}


def history(cls, tmp_path, options):
    from datasets import Dataset

    model, tokenizer = loader.load_model(loader.default_cache())
    tokenizer.padding_side = "left"
    prompts = [f"4 + 3 = 7\n{i} + {i + 1} =" for i in range(8)]
    trainer = cls(
        model=model,
        reward_funcs=tiny_grpo.letters,
        processing_class=tokenizer,
        args=GRPOConfig(
            str(tmp_path),
            per_device_train_batch_size=8,
            num_generations=4,
            max_steps=4,
            max_completion_length=8,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            save_strategy="no",
            gradient_checkpointing=False,
            optim="sgd",
            learning_rate=1e-3,
            **options,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
    )
    trainer.train()
    return [
        {name: x for name, x in row.items() if not any(clock in name for clock in CLOCKS)}
        for row in trainer.state.log_history
        if "loss" in row
    ]


def moved(first, second):
    """Return the largest relative difference of each figure over the steps; the absolute one for figures below 1."""
    worst = {}
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in b:
            difference = abs(a[name] - b[name]) / max(1.0, abs(b[name]))
            worst[name] = max(worst.get(name, 0.0), difference)
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("case", OPTIONS)
def test_the_default_path(case, tmp_path):
    with trl_in_float64():
        exact = history(GRPOTrainer, tmp_path, OPTIONS[case])
    stock = moved(history(GRPOTrainer, tmp_path, OPTIONS[case]), exact)
    with host.installed():
        under_install = history(GRPOTrainer, tmp_path, OPTIONS[case])
    fused = history(host.FusedGRPOTrainer, tmp_path, OPTIONS[case])
    for ours in (under_install, fused):
        for name, difference in moved(ours, exact).items():
            print(f"{name}: {difference:.2g}, stock {stock[name]:.2g}")
            assert difference <= stock[name] + FLOOR, name
