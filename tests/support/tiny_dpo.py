"""DPO runs on a tiny saved model, for the tests of trainers."""

from pathlib import Path
from typing import Any

import tiny_grpo  # noqa: F401  (sets the offline mode before huggingface_hub is imported)

from tokfuse.bench.tiny_model import saved_model, tokenizer


def pairs(count: int = 8, **columns: Any) -> Any:
    """Return a data set of pairs whose prompts and responses have different lengths."""
    from datasets import Dataset

    rows = [
        {
            "prompt": " ".join(f"w{(7 * i + j) % 40}" for j in range(1 + i % 3)),
            "chosen": " " + " ".join(f"w{(3 * i + j) % 40}" for j in range(1 + i % 4)),
            "rejected": " " + " ".join(f"w{(5 * i + 2 * j + 1) % 40}" for j in range(1 + (i + 2) % 5)),
            **{name: values[i] for name, values in columns.items()},
        }
        for i in range(count)
    ]
    return Dataset.from_list(rows)


def trainer(cls: type, output: Path, model: Any = None, **options: Any) -> Any:
    """Return a trainer on the tiny model. Keyword arguments go to the config, `extra` goes to the class."""
    from trl import DPOConfig

    extra = options.pop("extra", {})
    data = extra.pop("train_dataset", None)
    defaults = {
        "output_dir": str(output),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.3,
        "max_grad_norm": 0.0,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 3,
        "lr_scheduler_type": "constant",
    }
    return cls(
        model=saved_model() if model is None else model,
        args=DPOConfig(**{**defaults, **options}),
        train_dataset=pairs() if data is None else data,
        processing_class=tokenizer(),
        **extra,
    )
