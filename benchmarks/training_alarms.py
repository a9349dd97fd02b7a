"""Trains the bundled recipe with transformers' Trainer and a RoutingCallback, for the figures of
docs/training.md: `python benchmarks/training_alarms.py -o DIR --balance pooled --steps 1000`.

DIR/history is the counts trace of the run; DIR/run.json holds the Trainer's logs and the alarms.
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
from moe_inspect.demo import texts
from moe_inspect.demo import train as recipe
from moe_inspect.demo.balancing import BALANCING_LOSSES
from moe_inspect.training import RoutingCallback


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--balance", choices=list(BALANCING_LOSSES), default="pooled")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-steps", type=int, default=10)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    train(given.output, given.balance, given.steps, given.seed, given.log_steps)


if __name__ == "__main__":
    main()
