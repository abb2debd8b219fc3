"""Measure step time and peak memory of TRL's GRPO with and without tokfuse: same model, seeds and steps.

    python -m tokfuse.bench.trl_step --model FOLDER --rounds 3 --md
    python -m tokfuse.bench.trl_step --quick

Arms: TRL's GRPOTrainer; the same trainer after `tokfuse.integrations.trl.install`; FusedGRPOTrainer. Each
run is a separate process, and the arms alternate. Every figure is the median over all optimizer steps,
without the first step of each run. The loss side is everything except the transformer: in the forward from
its hidden states to the loss, including metrics; in the backward from the loss to the gradient of the
hidden states. Peak memory is the peak of the process minus its memory before training.

--model is a folder for `from_pretrained` (`make demo` stores SmolLM2-135M in ~/.cache/tokfuse). Without it,
or with --quick, the benchmark uses a tiny model with random weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tokfuse.bench import machine, tiny_model

ARMS = ("stock", "install", "fused")
FIGURES = ("step_s", "generation_s", "loss_side_s", "peak_mib")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the arms. Return 1 if their losses differ."""
    parser = argparse.ArgumentParser(prog="python -m tokfuse.bench.trl_step")
    parser.add_argument("--model", help="folder of the model; default: a tiny model")
    parser.add_argument("--quick", action="store_true", help="tiny model, one round of two steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=2, help="prompts per micro-batch")
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="new tokens per completion")
    parser.add_argument("--json", type=Path, help="append one row per run")
    parser.add_argument("--md", action="store_true", help="print a Markdown table at the end")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.quick:
        options.model, options.rounds, options.steps, options.length = None, 1, 3, 8
    if options.arm:
        print(json.dumps(_run_arm(options)))
        return 0
    machine.warn_about_waiting()
    rows: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        for arm in ARMS:
            row = _child(arm, options) | machine.facts("python -m tokfuse.bench.trl_step")
            row |= {"load_average": machine.load_average(), "trl": machine.version_of("trl")}
            rows.append(row)
            print(_line(row), flush=True)
            if options.json is not None:
                with options.json.open("a") as file:
                    print(json.dumps(row), file=file)
    if options.md:
        print(markdown(rows))
    return _compare(rows)


def _child(arm: str, options: argparse.Namespace) -> dict[str, Any]:
    given = ["--arm", arm]
    for name in ("model", "steps", "prompts", "generations", "length"):
        value = getattr(options, name)
        given += [] if value is None else [f"--{name}", str(value)]
    command = [sys.executable, "-m", "tokfuse.bench.trl_step", *given]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"trl_step: {arm} failed:\n{done.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


# ------------------------------------------------------------------------------------ inside an arm


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Clock:
    """Seconds of one optimizer step by part, measured from outside the trainer's code."""

    def __init__(self, trainer: Any) -> None:
        self.steps: list[dict[str, float]] = []
        self.parts = dict.fromkeys(("step_s", "generation_s", "loss_side_s"), 0.0)
        self.device = trainer.accelerator.device
        self.backbone_s, self.started = 0.0, 0.0
        self.trainer = trainer
        self._wrap(trainer, "training_step", self._after_step)
        self._wrap(trainer, "_prepare_inputs", lambda s: self._add("generation_s", s))
        self._wrap(trainer, "_compute_loss", self._after_loss)
        backward = trainer.accelerator.backward

        def timed(loss: torch.Tensor, **kwargs: Any) -> None:
            self.started = _now(self.device)
            backward(loss, **kwargs)

        trainer.accelerator.backward = timed
        base = trainer.model.base_model
        base.register_forward_pre_hook(self._enter)
        base.register_forward_hook(self._leave)

    def _wrap(self, owner: Any, name: str, after: Any) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if name == "_compute_loss":
                self.backbone_s = 0.0  # generation ran the transformer too
            start = _now(self.device)
            out = inner(*args, **kwargs)
            after(_now(self.device) - start)
            return out

        setattr(owner, name, timed)

    def _add(self, part: str, seconds: float) -> None:
        self.parts[part] += seconds

    def _enter(self, *_: Any) -> None:
        self.entered = _now(self.device)

    def _leave(self, module: Any, args: Any, out: Any) -> None:
        self.backbone_s += _now(self.device) - self.entered
        hidden = out.last_hidden_state
        if hidden.requires_grad:
            hidden.register_hook(self._head_is_done)

    def _head_is_done(self, grad: torch.Tensor) -> None:
        self._add("loss_side_s", _now(self.device) - self.started)

    def _after_loss(self, seconds: float) -> None:
        self._add("loss_side_s", seconds - self.backbone_s)

    def _after_step(self, seconds: float) -> None:
        self._add("step_s", seconds)
        if self.trainer.accelerator.sync_gradients:
            self.steps.append(self.parts)
            self.parts = dict.fromkeys(self.parts, 0.0)


def _run_arm(options: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from tokfuse.integrations import trl as host

    if options.arm == "install":
        host.install()
    cls = host.FusedGRPOTrainer if options.arm == "fused" else GRPOTrainer
    tiny = options.model is None
    texts = tiny_model.prompts(64) if tiny else [f"{i} + {i % 7} =" for i in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder,
            per_device_train_batch_size=options.prompts * options.generations,
            num_generations=options.generations,
            max_completion_length=options.length,
            max_steps=options.steps,
            logging_steps=1,
            learning_rate=1e-6,
            report_to=[],
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            save_strategy="no",
            seed=1,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32"},
        )
        trainer = cls(
            model=tiny_model.saved_model() if tiny else options.model,
            reward_funcs=_reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tiny_model.tokenizer()
            if tiny
            else AutoTokenizer.from_pretrained(options.model, padding_side="left"),
        )
        clock = Clock(trainer)
        before = _start_of_peak()
        trainer.train()
    peak_bytes = _peak() - before
    logged = [row for row in trainer.state.log_history if "loss" in row]
    medians = {name: statistics.median(step[name] for step in clock.steps[1:]) for name in FIGURES[:-1]}
    return {
        "arm": options.arm,
        "model": options.model or "tiny",
        "steps": options.steps,
        "sequences": options.prompts * options.generations,
        "length": options.length,
        **medians,
        "peak_mib": peak_bytes / 2**20,
        "losses": [row["loss"] for row in logged],
        "grad_norms": [row["grad_norm"] for row in logged],
    }


def _start_of_peak() -> int:
    """Reset the peak memory. Return the bytes in use now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return machine.status_bytes("VmRSS")


def _peak() -> int:
    on_gpu = torch.cuda.is_available()
    return torch.cuda.max_memory_allocated() if on_gpu else machine.status_bytes("VmHWM")


def _reward(completions: list[str], **_: Any) -> list[float]:
    """Return a reward that differs between samples. The cost of the step does not depend on its meaning."""
    return [len(set(text)) / max(1, len(text)) for text in completions]


# ------------------------------------------------------------------------------------------ results


def _line(row: dict[str, Any]) -> str:
    share = row["loss_side_s"] / row["step_s"]
    return (
        f"{row['arm']:<8} step {row['step_s']:.3f} s, generation {row['generation_s']:.3f} s, "
        f"loss side {row['loss_side_s']:.3f} s ({share:.0%}), peak {row['peak_mib']:.0f} MiB"
    )


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return one line per arm: medians over its runs, and the values relative to stock in brackets."""
    found = {
        arm: {name: statistics.median(r[name] for r in rows if r["arm"] == arm) for name in FIGURES} for arm in ARMS
    }
    first, stock = rows[0], found["stock"]
    lines = [
        f"TRL {first['trl']}, {first['model']}, {first['sequences']} sequences of "
        f"{first['length']} tokens per step, {first['cpu_model']}, {first['threads']} threads, "
        f"torch {first['torch']}, load average {max(r['load_average'] for r in rows)}",
        "",
        "| arm | step | generation | loss side | loss side, share of the step | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm, f in found.items():
        cells = [f"{f[n]:.3f} s ({f[n] / stock[n]:.2f}x)" for n in FIGURES[:-1]]
        peak = f"{f['peak_mib']:.0f} MiB ({f['peak_mib'] / max(stock['peak_mib'], 1e-9):.2f}x)"
        share = f"{f['loss_side_s'] / f['step_s']:.0%}"
        lines.append(f"| {arm} | {' | '.join(cells)} | {share} | {peak} |")
    return "\n".join(lines)


def _compare(rows: Sequence[dict[str, Any]]) -> int:
    """Return 0 if every arm has the same losses and metrics as the first stock run, otherwise 1."""
    stock = rows[0]
    for row in rows[1:]:
        for name in ("losses", "grad_norms"):
            for mine, theirs in zip(row[name], stock[name], strict=True):
                if abs(mine - theirs) > 1e-4 * max(1.0, abs(theirs)):
                    print(f"trl_step: {name} of {row['arm']} differ from stock: {row[name]}, {stock[name]}")
                    return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
