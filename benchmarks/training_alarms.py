"""When do alarms tell of a layer that collapses? The figures of docs/training.md:

    python -m benchmarks.training_alarms train -o DIR/pooled --balance pooled --steps 800
    python -m benchmarks.training_alarms train -o DIR/per-layer --balance per-layer --steps 2000
    python -m benchmarks.training_alarms untrained -o DIR/untrained
    python -m benchmarks.training_alarms results -o DIR

`train` trains the bundled recipe with transformers' Trainer and a RoutingCallback: history is the
counts trace of the run, run.json holds the Trainer's logs. `untrained` watches the first batches
at 20 random starts. `results` judges the three by the default rules, writes benchmarks/results and
the picture in docs.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainingArguments

import moe_inspect
from benchmarks.measuring import ROOT, machine, write_results
from moe_inspect.training import RoutingCallback, RoutingMonitor
from moe_inspect.watch.rules import DEFAULT_RULES
from tools.demo import texts
from tools.demo import train as recipe
from tools.demo.balancing import BALANCING_LOSSES


class Windows(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """The recipe's windows in the recipe's order: a batch is WINDOWS_PER_DOMAIN of each domain."""

    def __init__(self, streams: dict[str, recipe.Stream], seed: int):
        self.streams, self.seed = streams, seed

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        random = np.random.default_rng(self.seed)
        while True:
            for stream in self.streams.values():
                for _ in range(recipe.WINDOWS_PER_DOMAIN):
                    yield {"input_ids": torch.from_numpy(stream.sample(random))}


class RecipeTrainer(Trainer):
    """The Trainer with the recipe's losses; the language loss is logged apart."""

    balance: str

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        token_WS = inputs["input_ids"]
        output = model(input_ids=token_WS, output_router_logits=True, use_cache=False)
        loss = recipe.token_losses(output.logits, token_WS).mean()
        self.language_loss = loss.detach()
        if (balancing := BALANCING_LOSSES[self.balance]) is not None:
            loss = loss + recipe.BALANCE_COEFFICIENT * balancing(
                output.router_logits, recipe.EXPERTS, recipe.TOP_K
            )
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs["language_loss"] = float(self.language_loss)
        super().log(logs, *args, **kwargs)


def streams_of_recipe(seed: int) -> dict[str, recipe.Stream]:
    """The recipe's texts, by the bundled tokenizer, which was trained on them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(moe_inspect.__file__).parent / "demo/model")
    data = texts.load_packages(seed, texts.default_cache())
    return {
        name: recipe.encode(found, tokenizer, recipe.TRAIN_TOKENS_PER_DOMAIN)
        for name, found in data.train.items()
    }


def schedule(steps: int, of: int) -> Any:
    def share(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * (step + 1) / of))
        warm = min(1.0, (step + 1) / recipe.WARMUP_STEPS)
        return warm * max(recipe.FINAL_LEARNING_RATE_SHARE, cosine)

    return share


def train(out: Path, balance: str, steps: int, seed: int, log_steps: int) -> None:
    torch.set_num_threads(1)
    model = recipe.new_model(recipe.VOCABULARY, seed)
    streams = streams_of_recipe(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.LEARNING_RATE,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        fused=True,
    )
    callback = RoutingCallback(
        out / "history", detail="layers", on_alarm=lambda alarm: alarms.append(alarm)
    )
    alarms: list[Any] = []
    trainer = RecipeTrainer(
        model,
        TrainingArguments(
            str(out / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=recipe.WINDOWS_PER_DOMAIN * len(streams),
            logging_steps=log_steps,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            max_grad_norm=1.0,
            seed=seed,
        ),
        train_dataset=Windows(streams, seed),
        optimizers=(
            optimizer,
            torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(steps, recipe.STEPS)),
        ),
        callbacks=[callback],
    )
    trainer.balance = balance
    trainer.train()
    record = {
        "balance": balance,
        "steps": steps,
        "seed": seed,
        "alarms": [alarm.record() for alarm in alarms],
        "log": trainer.state.log_history,
    }
    (out / "run.json").write_text(json.dumps(record, indent=1))
    for alarm in alarms:
        print(alarm)
    print(f"{balance}: {len(alarms)} alarms in {steps} steps")


SEEDS, WINDOWS, WINDOW_STEPS = 20, 6, 5  # of `untrained`


def untrained(out: Path) -> None:
    """Windows of the recipe's batches at random starts, without a step of the optimizer."""
    torch.set_num_threads(1)
    streams, found = streams_of_recipe(0), []
    for seed in range(SEEDS):
        model, rows = (
            recipe.new_model(recipe.VOCABULARY, seed).train(),
            iter(Windows(streams, seed)),
        )
        batch = recipe.WINDOWS_PER_DOMAIN * len(streams)
        with RoutingMonitor(
            model, log_steps=WINDOW_STEPS, detail="layers", on_alarm=lambda alarm: None
        ) as monitor:
            for _ in range(WINDOWS * WINDOW_STEPS):
                model(input_ids=torch.stack([next(rows)["input_ids"] for _ in range(batch)]))
                if metrics := monitor.step():
                    found.append({"seed": seed, "step": monitor.steps, **metrics})
        print(seed, len(monitor.raised), metrics["routing/max_vio/worst"], flush=True)
    (out / "run.json").write_text(json.dumps({"seeds": SEEDS, "log": found}, indent=1))


def results(folder: Path) -> None:
    """Judges the recorded runs and draws them."""
    runs = {name: read_run(folder / name) for name in ("pooled", "per-layer")}
    start = json.loads((folder / "untrained/run.json").read_text())
    measured: dict[str, Any] = {"default_rules": list(DEFAULT_RULES)}
    for name, (rows, alarms) in runs.items():
        measured[name] = {
            "steps": rows[-1]["step"],
            "alarms": alarms,
            "highest_max_vio": max(row["routing/max_vio/worst"] for row in rows),
            "max_vio_at_the_end": [rows[-1][f"routing/max_vio/layer_{n}"] for n in range(4)],
            "step": [row["step"] for row in rows],
            "language_loss": [round(row["language_loss"], 4) for row in rows],
            "max_vio": [
                [round(row[f"routing/max_vio/layer_{n}"], 4) for n in range(4)] for row in rows
            ],
        }
    measured["untrained"] = {
        "seeds": start["seeds"],
        "windows": len(start["log"]),
        "alarms": sum(row["routing/alarms"] for row in start["log"]),
        "highest_max_vio": max(row["routing/max_vio/worst"] for row in start["log"]),
        "most_dead_experts": max(row["routing/dead_experts/worst"] for row in start["log"]),
    }
    facts = {**machine(), "command": "python -m benchmarks.training_alarms"}
    print(f"wrote {write_results('training-alarms', facts, measured)}")
    draw(measured, ROOT / "docs/training.png")


def read_run(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What it logged, and the alarms that it raised."""
    run = json.loads((folder / "run.json").read_text())
    return [row for row in run["log"] if "language_loss" in row], run["alarms"]


def draw(measured: dict[str, Any], path: Path) -> None:
    """max_vio of each layer in both runs, and their losses over the same steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), dpi=110)
    axes = figure.subplots(1, 3)
    last = measured["pooled"]["steps"]
    for ax, name in zip(axes, ("pooled", "per-layer"), strict=False):
        run = measured[name]
        for layer, vio in enumerate(zip(*run["max_vio"], strict=True)):
            ax.plot(run["step"], vio, label=f"layer {layer}", linewidth=1)
        for alarm in run["alarms"]:
            ax.axvline(alarm["step"], color="crimson", linewidth=0.8, linestyle="--")
        ax.axhline(1.5, color="grey", linewidth=0.8)
        ax.set(title=f"{name} loss", xlabel="step", ylabel="max_vio", xlim=(0, last), ylim=(0, 3))
        axes[2].plot(run["step"], run["language_loss"], label=f"{name} loss", linewidth=1)
    axes[1].legend(fontsize=8)
    axes[2].set(title="language loss", xlabel="step", ylabel="nats", xlim=(0, last))
    axes[2].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["train", "untrained", "results"])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--balance", choices=list(BALANCING_LOSSES), default="pooled")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-steps", type=int, default=10)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    if given.what == "results":
        results(given.output)
    elif given.what == "untrained":
        untrained(given.output)
    else:
        train(given.output, given.balance, given.steps, given.seed, given.log_steps)


if __name__ == "__main__":
    main()
