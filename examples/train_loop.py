"""Logs the balance of every layer while a model trains. Counts stay on the device and no trace is
written. Run: python examples/train_loop.py"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_inspect
from moe_inspect.demo import MODEL_DIR

STEPS, LOG_EVERY = 6, 2

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
batch = tokenizer("The tide comes in twice a day. " * 16, return_tensors="pt")

with moe_inspect.record(model, counts_only=True) as recorder:
    for step in range(1, STEPS + 1):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % LOG_EVERY == 0:
            # per layer: a mean over layers would hide the one that collapses
            for row in recorder.balance().itertuples():
                print(
                    f"step {step} layer {row.layer}: max_vio {row.max_vio:.2f}, "
                    f"dead experts {row.dead_experts}"
                )
