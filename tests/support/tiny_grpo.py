"""GRPO runs on a tiny saved model, for the tests of trainers."""

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # huggingface_hub reads it at import

import torch

from tokfuse.bench import tiny_model
from tokfuse.bench.tiny_model import saved_model, tokenizer


def prompts(count: int = 8) -> Any:
    """Return a data set of prompts of different lengths."""
    from datasets import Dataset

    return Dataset.from_dict({"prompt": tiny_model.prompts(count)})


def reward(completions: list[str], **_: Any) -> list[float]:
    """Return the share of even words, which differs between the samples of a prompt."""
    return [sum(int(w[1:]) % 2 == 0 for w in c.split() if w[1:].isdigit()) / 6 for c in completions]


def letters(completions: list[str], **_: Any) -> list[float]:
    """Return the share of different letters, which is a non-zero reward for the text of any model."""
    return [len(set(text)) / max(1, len(text)) for text in completions]


def trainer(cls: type, output: Path, model: Any = None, **options: Any) -> Any:
    """Return a trainer on the tiny model. Keyword arguments go to the config, `extra` goes to the class."""
    from trl import GRPOConfig

    extra = options.pop("extra", {})
    defaults = {
        "output_dir": str(output),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 3,
        "temperature": 0.9,
        "lr_scheduler_type": "constant",
    }
    return cls(
        model=saved_model() if model is None else model,
        reward_funcs=reward,
        args=GRPOConfig(**{**defaults, **options}),
        train_dataset=prompts(),
        processing_class=tokenizer(),
        **extra,
    )


def load(tied: bool = True) -> Any:
    """Return the saved model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(saved_model(tied), dtype=torch.float32)
