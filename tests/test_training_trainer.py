"""RoutingCallback: the counts of a Trainer, in its logs, its history and its checkpoints."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from transformers.models.mixtral import modeling_mixtral

import moe_inspect
from moe_inspect.errors import MoeInspectError
from moe_inspect.training import RoutingCallback
from moe_inspect.watch.alarms import Alarm
from tests.conftest import ROOT, Put
from tests.support.trained import EXPERTS, LAYERS, counted, reset
from tests.support.zoo import VOCABULARY, token_batch
from tests.test_audit_loss import by_router
from tests.test_training import history

QUIET: dict[str, Any] = {"save_strategy": "no", "report_to": [], "disable_tqdm": True}
QUIET |= {"use_cpu": True, "remove_unused_columns": False}
# right-padded, of 4 to 12 tokens
BATCH = token_batch(np.random.default_rng(0).integers(4, 13, 48).tolist())
BATCH["labels"] = BATCH["input_ids"].masked_fill(BATCH["attention_mask"] == 0, -100)
ROWS: Any = [{name: rows[n] for name, rows in BATCH.items()} for n in range(48)]


def trainer(
    out: Path, callback: RoutingCallback, model: Any = None, **arguments: Any
) -> hf.Trainer:
    sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 16}
    usual = {**QUIET, **sizes, "max_steps": 6, "logging_steps": 2}
    given = hf.TrainingArguments(str(out / "trainer"), **usual | arguments)
    data = {"train_dataset": ROWS, "eval_dataset": ROWS}
    return hf.Trainer(model or counted(), given, **data, callbacks=[callback])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_counts_are_of_the_batches(tmp_path: Path, accumulate: int, checkpointing: bool) -> None:
    of = {"gradient_accumulation_steps": accumulate, "gradient_checkpointing": checkpointing}
    of |= {"eval_strategy": "steps", "eval_steps": 3}
    it = trainer(tmp_path, RoutingCallback(tmp_path / "h"), **of)
    it.train()
    assert it.model.steps_passes == 6 * accumulate
    assert (history(tmp_path / "h") == it.model.load).all()
    trace = moe_inspect.open_trace(tmp_path / "h")
    assert trace.status == "complete"
    assert [s.files.last_batch for s in trace.shards] == [2, 4, 6]
    # the metrics are in the row of the loss
    rows = [row for row in it.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all("routing/max_vio/worst" in row for row in rows)
    assert "routing/drift/median" in rows[1]
    evaluated = [row for row in it.state.log_history if "eval_routing/max_vio/worst" in row]
    assert [row["step"] for row in evaluated] == [3, 6]


def test_an_alarm_stops_the_training(tmp_path: Path) -> None:
    raised: list[Alarm] = []
    rules = ["max_vio > 0 even by chance for 2 windows"]
    it = trainer(tmp_path, RoutingCallback(rules=rules, on_alarm=["stop", raised.append]))
    it.train()
    assert it.state.global_step == 4
    assert {alarm.layer for alarm in raised} == set(range(LAYERS))
    assert {alarm.since for alarm in raised} == {1}


def test_a_loop_without_a_trainer_calls_the_callback(tmp_path: Path) -> None:
    """Metrics go into the dictionaries that the loop passes, instead of into a Trainer's logs."""
    model, callback = counted().train(), RoutingCallback(tmp_path / "h", flush_steps=3)
    args = hf.TrainingArguments(str(tmp_path / "trainer"), **QUIET)
    state, control, inputs = hf.TrainerState(), hf.TrainerControl(), ROWS[0]
    callback.on_train_begin(args, state, control, model=model)
    for step in (1, 2, 3):
        state.global_step, control.should_log = step, step == 2
        model(**{name: row[None] for name, row in inputs.items()}).loss.backward()
        callback.on_step_end(args, state, control)
    logs, evaluated = {"loss": 1.0}, {"eval_loss": 1.0}
    callback.on_log(args, state, control, logs)
    assert logs["routing/tokens"] == 2 * int(inputs["attention_mask"].sum())
    callback.on_evaluate(args, state, control, evaluated)  # of no pass
    assert evaluated == {"eval_loss": 1.0}
    model.eval()(**{name: row[None] for name, row in inputs.items()})
    callback.on_evaluate(args, state, control, evaluated)
    assert {"eval_loss", "eval_routing/max_vio/worst"} < evaluated.keys()
    callback.on_train_end(args, state, control)
    assert (history(tmp_path / "h") == model.load).all()
    # committed after three steps, as the option states, and not at the log of step 2
    trace = moe_inspect.open_trace(tmp_path / "h")
    assert [shard.files.last_batch for shard in trace.shards] == [3]


def test_copies_of_a_model_in_one_process_are_refused() -> None:
    """A Trainer that is not started with torchrun makes one for each GPU."""
    args: Any = SimpleNamespace(n_gpu=2)
    with pytest.raises(MoeInspectError, match=r"runs 2 copies .*: start it with torchrun"):
        RoutingCallback().on_train_begin(args, hf.TrainerState(), hf.TrainerControl())


def test_the_loss_is_audited_at_the_start_and_the_load_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], put: Put
) -> None:
    put(modeling_mixtral, load_balancing_loss_func=by_router)

    def trained(coefficient: float, **arguments: Any) -> RoutingCallback:
        callback = RoutingCallback(audit=True, rules=())
        model = hf.MixtralForCausalLM(counted().config)
        model.load_state_dict(counted().state_dict())
        model.config.router_aux_loss_coef = model.router_aux_loss_coef = coefficient
        for layer in model.model.layers:  # two experts have more tokens
            layer.mlp.gate.weight.data[:2] *= 3
        of = {"learning_rate": 3e-3, "per_device_train_batch_size": 16, **arguments}
        trainer(tmp_path, callback, model, **of).train()
        return callback

    audited = trained(1.0, max_steps=30, logging_steps=5)
    assert audited.audited is not None
    assert audited.audited.factor == pytest.approx(1, rel=1e-4)
    assert audited.audited.added == pytest.approx(1, rel=0.01)
    assert audited.moved is not None
    assert audited.moved.severity == "good", audited.moved.text
    said = capsys.readouterr().err
    assert "routing: note: The balancing loss is 1 × Switch's loss" in said
    assert said.count(f"routing: good: {audited.moved.text}") == 1
    without = trained(1e-9, max_steps=30, logging_steps=5, learning_rate=1e-6)
    assert without.moved is not None
    assert without.moved.severity == "note"
    few = trained(1.0, max_steps=4)
    assert few.moved is not None
    assert "4 steps are too few to tell" in few.moved.text


def test_a_training_that_ended_before_its_first_step_audits_once_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audits = list[object]()
    found = SimpleNamespace(findings=[])
    made = lambda *_: audits.append(found) or found  # noqa: E731
    monkeypatch.setattr("moe_inspect.training.callback.audit_loss", made)
    it = trainer(tmp_path, RoutingCallback(audit=True))

    class Failing(hf.TrainerCallback):
        def on_substep_end(self, *_: Any, **__: Any) -> None:
            raise ArithmeticError

    it.args.gradient_accumulation_steps = 2
    it.add_callback(Failing)
    with pytest.raises(ArithmeticError):
        it.train()
    assert not audits
    it.remove_callback(Failing)
    it.train()
    assert len(audits) == 1


def test_a_training_that_failed_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    callback = RoutingCallback(tmp_path / "h")
    it = trainer(tmp_path, callback)

    class Failing(hf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise ArithmeticError

    it.add_callback(Failing)
    with pytest.raises(ArithmeticError):
        it.train()
    it.remove_callback(Failing)
    callback.options["overwrite"] = True
    reset(it.model)
    it.train()
    assert (history(tmp_path / "h") == it.model.load).all()


def test_a_training_resumed_from_a_checkpoint_has_no_step_twice(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    it = trainer(tmp_path, RoutingCallback(tmp_path / "h"), **options)
    it.train()
    last = moe_inspect.open_trace(tmp_path / "h")
    assert [s.files.last_batch for s in last.shards] == [2, 3, 4, 6]
    kept = np.zeros_like(history(tmp_path / "h"))
    for shard in list(last.shards)[:2]:
        table = shard.table("counts", ["assignments"])
        kept += table["assignments"].to_numpy().reshape(kept.shape)
    again = trainer(tmp_path, RoutingCallback(tmp_path / "h"), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "trainer/checkpoint-3"))
    assert again.model.steps_passes == 3
    assert (history(tmp_path / "h") == kept + again.model.load).all()
    assert moe_inspect.check(tmp_path / "h", quick=True).ok


KILLED = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
import transformers as hf
from moe_inspect.training import RoutingCallback
from tests.test_training_trainer import trainer

class Say(hf.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print(state.global_step, flush=True)

out = Path(sys.argv[1])
it = trainer(out, RoutingCallback(out / "h"), max_steps=500, save_strategy="steps", save_steps=4)
it.add_callback(Say)
it.train()
"""


def test_a_killed_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip().isdigit() and int(line) >= 7:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    killed = moe_inspect.open_trace(tmp_path / "h")
    assert killed.status == "recording"
    assert [s.files.last_batch for s in killed.shards][:3] == [2, 4, 6]
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 10}
    again = trainer(tmp_path, RoutingCallback(tmp_path / "h"), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "trainer/checkpoint-4"))
    whole = trainer(tmp_path / "whole", RoutingCallback(tmp_path / "whole/h"), max_steps=10)
    whole.train()
    found, expected = (moe_inspect.open_trace(p / "h") for p in (tmp_path, tmp_path / "whole"))
    assert found.n_tokens == expected.n_tokens
    assert found.status == "complete"
    assert (history(tmp_path / "h").sum(1) == history(tmp_path / "whole/h").sum(1)).all()
    spans = [(s.files.first_batch, s.files.last_batch) for s in found.shards]
    assert [step for a, b in spans for step in range(a or 0, b + 1)] == list(range(1, 11))


class Board(hf.TrainerCallback):
    """A board as TensorBoard's, which keeps the steps of its pictures."""

    def __init__(self) -> None:
        self.tb_writer, self.steps = self, list[int]()

    def add_image(self, name: str, pixels: np.ndarray, step: int, dataformats: str) -> None:
        self.steps.append(step)


@pytest.mark.parametrize(("every", "steps"), [(10, [2, 6]), (0, [])])
def test_a_run_ends_with_a_picture(tmp_path: Path, every: int, steps: list[int]) -> None:
    board, it = Board(), trainer(tmp_path, RoutingCallback(picture_logs=every))
    it.add_callback(board)
    it.train()
    assert board.steps == steps


def test_tensorboard_has_keys_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    trainer(tmp_path, RoutingCallback(picture_logs=2), report_to=["tensorboard"]).train()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert len(events.Scalars("train/routing/max_vio/worst")) == 3
    assert [image.step for image in events.Images("routing/load")] == [2, 6]
    assert events.Images("routing/load")[0].width > 200


def test_mlflow_has_keys_and_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/ml")
    mlflow.set_tracking_uri(f"file://{tmp_path}/ml")
    trainer(tmp_path, RoutingCallback(), report_to=["mlflow"]).train()
    names = [path.name for path in (tmp_path / "ml").rglob("*")]
    assert "routing" in names
    assert {"load-00000002.png", "load-00000006.png"} <= set(names)
    (scalars,) = (tmp_path / "ml").rglob("metrics/routing/max_vio/worst")
    assert len(scalars.read_text().splitlines()) == 3


def test_wandb_has_keys_and_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    trainer(tmp_path, RoutingCallback(), report_to=["wandb"]).train()
    import wandb

    wandb.finish()
    (log,) = tmp_path.rglob("*.wandb")
    until = time.monotonic() + 20
    # a process of its own writes the file; the last row is the summary of the run
    while len(rows := _wandb_history(log)) < 4 and time.monotonic() < until:
        time.sleep(0.1)
    keys = [key for row in rows for key in row]
    assert keys.count("train/routing/max_vio/worst") == 3
    assert keys.count("routing/load/path") == 2  # of the first log and of the last
    assert len(list(tmp_path.rglob("media/images/routing/*.png"))) == 2


def _wandb_history(path: Path) -> list[list[str]]:
    """The keys of each row: records in blocks of 32 KiB, as in LevelDB's logs, after 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, pieces, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        pieces += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pieces)
            pieces = b""
            if record.HasField("history"):
                items = record.history.item
                rows.append([item.key or "/".join(item.nested_key) for item in items])
    return rows


def count_at_routers(model: Any) -> np.ndarray:
    """Of the first call of each router in every training pass, int64, filled as the model runs."""
    load_LE = np.zeros((LAYERS, EXPERTS), np.int64)
    routers = [layer.mlp.gate for layer in model.model.layers]
    real: dict[int, Any] = {}

    def begin(module: Any, args: Any, kwargs: Any) -> None:
        real.clear()
        if module.training and torch.is_grad_enabled():
            mask = kwargs.get("attention_mask")
            real.update(dict.fromkeys(range(LAYERS), slice(None) if mask is None else mask != 0))

    def count(layer: int, output: Any) -> None:
        if (rows := real.pop(layer, None)) is not None:
            ids = output[2] if isinstance(rows, slice) else output[2][rows.reshape(-1)]
            load_LE[layer] += np.bincount(ids.reshape(-1).numpy(), minlength=EXPERTS)

    model.register_forward_pre_hook(begin, with_kwargs=True)
    for layer, router in enumerate(routers):
        router.register_forward_hook(lambda m, a, output, layer=layer: count(layer, output))
    return load_LE


@pytest.mark.parametrize("packing", [False, True])
def test_trl_gives_the_same_counts(tmp_path: Path, packing: bool) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    model = counted()
    load_LE = count_at_routers(model)
    model.config.architectures = ["MixtralForCausalLM"]
    tokenizer = hf.AutoTokenizer.from_pretrained(ROOT / "moe_inspect/demo/model")
    tokenizer.pad_token = tokenizer.eos_token
    rng = np.random.default_rng(0)
    rows = [{"input_ids": rng.integers(2, VOCABULARY, n).tolist()} for n in rng.integers(3, 12, 40)]
    it = trl.SFTTrainer(
        model,
        trl.SFTConfig(
            str(tmp_path / "trl"),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            max_steps=3,
            logging_steps=1,
            packing=packing,
            max_length=16,
            bf16=False,
            **QUIET,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[RoutingCallback(tmp_path / "h")],
    )
    it.train()
    assert load_LE.sum() > 0
    assert (history(tmp_path / "h") == load_LE).all()
    rows_of_loss = [row for row in it.state.log_history if "loss" in row]
    assert all("routing/max_vio/worst" in row for row in rows_of_loss)
    assert all("mean_token_accuracy" in row for row in rows_of_loss)  # TRL's own are still there


def test_lightning_gives_the_same_counts(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from moe_inspect.training import LightningRoutingCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = counted()

        def training_step(self, batch: Any, n: int) -> Any:
            return self.model(**batch).loss

        def validation_step(self, batch: Any, n: int) -> Any:
            self.model(**batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    from lightning.pytorch.loggers import CSVLogger

    module, logger = Module(), CSVLogger(tmp_path / "csv")
    loader = torch.utils.data.DataLoader(ROWS, batch_size=4)
    off = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    steps = {"max_steps": 4, "accumulate_grad_batches": 2, "log_every_n_steps": 2}
    callbacks = [LightningRoutingCallback(tmp_path / "h")]
    usual = {**dict.fromkeys(off, False), **steps, "logger": logger, "callbacks": callbacks}
    evaluates = {"val_check_interval": 4, "limit_val_batches": 2}
    lightning.Trainer(accelerator="cpu", **usual, **evaluates).fit(module, loader, loader)
    assert module.model.steps_passes == 8
    assert (history(tmp_path / "h") == module.model.load).all()
    logged = "".join(path.read_text() for path in (tmp_path / "csv").rglob("metrics.csv"))
    assert "routing/max_vio/worst" in logged
    assert "eval_routing/max_vio/worst" in logged
