"""The training loop: AdamW, evaluation, metrics, and snapshots from which a run continues bit for bit.

It knows nothing of what is trained: a recipe hands it a module and two functions. Everything random in step n is drawn
after seeding with (seed, n), so a snapshot needs no generator state.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.training.config import OptimiserConfig, RunConfig
from models.training.metrics import MetricsLog

CHECKPOINT = "checkpoint"
"""The subdirectory of a run that a recipe saves its checkpoint in."""
SNAPSHOT = "snapshot.pt"
METRICS = "metrics.jsonl"
_LOSS_RECORDS_PER_EVALUATION = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is trained, and how it is judged.

    `loss` draws a batch, of torch's global generator, and returns its mean loss; `evaluate` returns named figures, of
    which "validation_loss" is shown; `save` writes the checkpoint.
    """

    module: nn.Module
    loss: Callable[[], Tensor]
    evaluate: Callable[[], dict[str, float]]
    save: Callable[[], None]


def train(task: Task, run: RunConfig, optimiser_config: OptimiserConfig, directory: Path) -> dict[str, float]:
    """Train until `run.steps` steps are done, continuing from the snapshot in `directory` if there is one.

    Every `run.evaluate_every` steps, and at the end, the module is evaluated and a checkpoint and a snapshot are
    written. Returns the last evaluation.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    optimiser = _optimiser(task.module, optimiser_config)
    steps_done = _restore(directory / SNAPSHOT, task.module, optimiser)
    log = MetricsLog(directory / METRICS, steps_done=steps_done)
    figures = _evaluate(task) if steps_done == run.steps else {}
    every = max(1, run.evaluate_every // _LOSS_RECORDS_PER_EVALUATION)
    since, started, losses = steps_done, time.perf_counter(), []
    progress = tqdm(initial=steps_done, total=run.steps, unit="step", disable=None, dynamic_ncols=True)
    with progress:
        for step in range(steps_done, run.steps):
            rate = learning_rate(step, run.steps, optimiser_config)
            losses.append(_step(task, optimiser, rate, optimiser_config.clip_norm, run, step))
            done = step + 1
            progress.update()
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss is {losses[-1]} after {done} steps; try a lower learning_rate")
            if done % every == 0 or done == run.steps:
                now = time.perf_counter()
                log.write(
                    done,
                    training_loss=sum(losses) / len(losses),
                    learning_rate=rate,
                    steps_per_second=(done - since) / (now - started),
                )
                since, started, losses = done, now, []
            if done % run.evaluate_every == 0 or done == run.steps:
                figures = _evaluate(task)
                log.write(done, **figures)
                tqdm.write(f"step {done}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
                task.save()
                _snapshot(directory / SNAPSHOT, task.module, optimiser, done)
                started = time.perf_counter()
    return figures


def learning_rate(step: int, steps: int, config: OptimiserConfig) -> float:
    """Return the rate of step `step`, counted from 0: it rises over the warm-up and has its least at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine


def _step(
    task: Task, optimiser: torch.optim.Optimizer, rate: float, clip_norm: float, run: RunConfig, step: int
) -> float:
    torch.manual_seed(_seed(run.seed, step))
    for group in optimiser.param_groups:
        group["lr"] = rate
    task.module.train()
    device = next(task.module.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=run.autocast):
        loss = task.loss()
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(task.module.parameters(), clip_norm)
    optimiser.step()
    return loss.item()


def _seed(seed: int, step: int) -> int:
    """Return a seed for one step; runs with different seeds share none for their first 2**32 steps."""
    return (seed << 32) + step


@torch.no_grad()
def _evaluate(task: Task) -> dict[str, float]:
    task.module.eval()
    return task.evaluate()


def _optimiser(module: nn.Module, config: OptimiserConfig) -> torch.optim.AdamW:
    parameters = list(module.parameters())
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2]},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay, fused=True)


def _snapshot(path: Path, module: nn.Module, optimiser: torch.optim.Optimizer, step: int) -> None:
    """Write the snapshot beside its place and move it there, so that a crash leaves the older one."""
    scratch = path.with_suffix(".tmp")
    torch.save({"step": step, "module": module.state_dict(), "optimiser": optimiser.state_dict()}, scratch)
    os.replace(scratch, path)


def _restore(path: Path, module: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Load a snapshot and return how many steps it has done; 0 without one."""
    if not path.is_file():
        return 0
    snapshot = torch.load(path, weights_only=True)
    module.load_state_dict(snapshot["module"])
    optimiser.load_state_dict(snapshot["optimiser"])
    return snapshot["step"]
