"""TRL's default GRPO on SmolLM2-135M: stock, under install(), and FusedGRPOTrainer agree."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs the group `hosts`")
pytest.importorskip("gguf", reason="needs the group `demo`")

import tiny_grpo
from trl import GRPOConfig, GRPOTrainer

from tokfuse.integrations import trl as host

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from grpo_demo import model as loader

KEYS = ("loss", "grad_norm", "entropy", "completions/mean_length", "reward", "clip_ratio/low_mean")


def losses(cls, tmp_path, model, tokenizer):
    from datasets import Dataset

    prompts = [f"4 + 3 = 7\n{i} + {i + 1} =" for i in range(4)]
    trainer = cls(
        model=model, reward_funcs=tiny_grpo.letters, processing_class=tokenizer,
        args=GRPOConfig(
            str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_steps=2,
            max_completion_length=8, logging_steps=1, report_to=[], use_cpu=True, bf16=False,
            disable_tqdm=True, save_strategy="no", gradient_checkpointing=False, optim="sgd",
            learning_rate=1e-3,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
    )  # fmt: skip
    trainer.train()
    return [{k: row[k] for k in KEYS} for row in trainer.state.log_history[:-1]]


@pytest.mark.slow
def test_the_default_path(tmp_path):
    def run(cls):
        model, tokenizer = loader.load_model(loader.default_cache())
        tokenizer.padding_side = "left"
        return losses(cls, tmp_path, model, tokenizer)

    stock = run(GRPOTrainer)
    with host.installed():
        under_install = run(GRPOTrainer)
    fused = run(host.FusedGRPOTrainer)
    for ours in (under_install, fused):
        for mine, theirs in zip(ours, stock, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=2e-6)
