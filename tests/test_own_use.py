"""Models of one's own in the ways that people use them: wrapped, failing, beside others, and loaded
by code that may be wrong."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import moe_inspect
from moe_inspect.capture.hook.inputs.arguments import by_name
from moe_inspect.cli import app
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.own import as_tokenizer, load_object, load_own
from tests.support import own
from tests.support.own import record_once
from tests.test_own import T, spec
from tests.test_own_probes import Probing


class Wrapper(nn.Module):
    """Hands on its arguments, as DistributedDataParallel does."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("how", ["probe", "spec", "discover"])
def test_a_wrapped_model_is_recorded(tmp_path: Path, how: str) -> None:
    model = own.gpt(probes=how == "probe")
    options: dict[str, Any] = {"spec": {"routers": [spec()]}, "discover": {"discover": True}}
    own.exact(model, tmp_path / "t", 2, Wrapper(model), **options.get(how, {}))


@pytest.mark.parametrize("inside", [False, True])
def test_discovery_refuses_what_is_compiled(tmp_path: Path, inside: bool) -> None:
    compiled = own.gpt(probes=False)
    if inside:
        compiled.compile(backend="eager")
    else:
        compiled = torch.compile(compiled, backend="eager")
    with pytest.raises(MoeInspectError, match="cannot look into compiled code"):
        record_once(compiled, tmp_path / "t", discover=True)


def test_a_forward_that_returns_nothing_is_recorded(tmp_path: Path) -> None:
    """It keeps its loss in an attribute, say. What raises is told from it, also while another
    exception is handled."""

    class Silent(Wrapper):
        fails = False

        def forward(self, idx: Tensor) -> None:
            self.loss = self.module(idx).sum()
            if self.fails:
                raise ArithmeticError

    model = Silent(own.gpt())
    with moe_inspect.record(model, tmp_path / "t") as recorder:
        model(own.tokens())
        try:
            raise KeyError
        except KeyError:
            model(own.tokens())
        model.fails = True
        with pytest.raises(ArithmeticError):
            model(own.tokens())
        assert recorder.tokens == 2 * T
    assert own.path_of(tmp_path / "t").n_tokens == 2 * T


@pytest.mark.parametrize("options", [{}, {"discover": True}])
def test_a_pass_that_failed_is_over(tmp_path: Path, options: Any) -> None:
    """The probes of another model after it are not this one's."""
    model, other = own.gpt(probes=not options), Probing(None)
    other.probing = lambda n: moe_inspect.probe(
        torch.zeros(T, 1).long(), torch.ones(T, 1), layer=9, experts=2
    )

    def fail(*_: Any) -> None:
        raise ArithmeticError

    with own.watched(model) as given, moe_inspect.record(model, tmp_path / "t", **options):
        model(own.tokens())
        hook = model.head.register_forward_pre_hook(fail)
        with pytest.raises(ArithmeticError):
            model(own.tokens())
        hook.remove()
        other(own.tokens())
        torch.randn(3, 8).topk(2)
        model(own.tokens())
    for passes in given.values():
        del passes[1]
    assert own.same(own.path_of(tmp_path / "t"), given) == 4 * 2 * T


def test_a_model_in_another_thread_is_another(tmp_path: Path) -> None:
    """Its probes are called while the pass of this one runs."""
    model, other = own.gpt(), own.gpt()
    thread = threading.Thread(target=other, args=(own.tokens(5, 7),))

    def run_other(*_: Any) -> None:
        thread.start()
        thread.join()

    model.blocks[1].register_forward_pre_hook(run_other)
    own.exact(model, tmp_path / "t")
    assert thread.ident


def test_two_models_of_one_layer_number_are_told_apart_by_their_experts(tmp_path: Path) -> None:
    def both(n: int) -> None:
        for experts in (2, 3):
            moe_inspect.probe(torch.zeros(T, 1).long(), torch.ones(T, 1), layer=0, experts=experts)

    with pytest.raises(MoeInspectError, match="called with experts=3 and with 2"):
        record_once(Probing(both), tmp_path / "t")


def test_a_copy_made_meanwhile_is_not_recorded(tmp_path: Path) -> None:
    """As of the weights' moving average."""
    model, ids = own.gpt(), own.tokens()
    with own.watched(model) as given, moe_inspect.record(model, tmp_path / "t"):
        model(ids)
        copied = copy.deepcopy(model)
        for block in copied.blocks:  # its hooks are those of `watched`
            block.experts._forward_hooks.clear()
        copied(own.tokens(2, 5))
        model(ids)
    assert own.same(own.path_of(tmp_path / "t"), given) == 4 * 2 * T


def test_a_recording_without_a_forward_pass_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = own.gpt()
    with moe_inspect.record(model, tmp_path / "t"):
        model.forward(own.tokens())
    assert "no forward pass of GPT was recorded" in capsys.readouterr().err
    record_once(model, tmp_path / "t")
    assert not capsys.readouterr().err


def test_masks_are_read_as_what_they_are() -> None:
    """Ones and zeros of any type; added to scores, a mask is 0 for tokens; one token is one."""
    ids, real = own.tokens(), torch.ones(3, 16, dtype=torch.bool)
    real[1, 10:] = False
    read = by_name(["tokens", "attention_mask"], False)
    for given in (
        real.long(),
        real.float(),
        real.bfloat16(),
        torch.zeros(3, 16).masked_fill(~real, float("-inf")),
        torch.zeros(3, 16).masked_fill(~real, -1e9),
    ):
        assert torch.equal(read((ids, given), {})["attention_mask"] != 0, real)
    assert (read((ids, torch.zeros(3, 16)), {})["attention_mask"] != 0).all()
    assert read((ids[:1, :1], torch.ones(1, 1)), {})["attention_mask"].all()


# --- loaders and tokenizers


def test_a_tokenizer_that_fails_says_on_what() -> None:
    class Strict:
        n_vocab = 256

        def encode(self, text: str) -> list[int]:
            if "<|" in text:
                raise ValueError("disallowed special token\nand much more")
            return list(text.encode())

        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode()

    strict = as_tokenizer(Strict())
    assert strict("ab")["input_ids"] == [97, 98]
    said = r"\(Strict\) failed on the text 'a<\|b\|>': ValueError: disallowed special token$"
    with pytest.raises(MoeInspectError, match=said):
        strict("a<|b|>")

    class Tiktoken(Strict):
        def encode_ordinary(self, text: str) -> list[int]:
            return list(text.encode())

    assert len(as_tokenizer(Tiktoken())("a<|b|>")["input_ids"]) == 6


def test_loaders_that_are_wrong_are_named(tmp_path: Path) -> None:
    good = own.example()
    loader: Any
    for loader, match in (
        (3, "a loader is a function that returns .* not a int"),
        (lambda: (own.gpt(), good.Bytes(), 3), "returned a int in place of a function"),
        (lambda: (own.gpt(), object()), "a object is not a tokenizer"),
        (lambda: exit(2), "failed: SystemExit: 2"),
    ):
        with pytest.raises(MoeInspectError, match=match):
            load_own(loader, "x")
    file = tmp_path / "script.py"
    file.write_text("import sys\nsys.exit('usage: script.py')\n")
    with pytest.raises(MoeInspectError, match=r"cannot be run: SystemExit: usage: script\.py"):
        load_object(f"{file}:load")


def test_routers_that_are_none_are_named_by_the_cli(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import moe_inspect\nROUTERS = 3\nNAMES = ['a']\n")
    torch.save(own.gpt().state_dict(), tmp_path / "model.pt")
    command = ["trace", f"{tmp_path}/model.pt", "--loader", f"{own.EXAMPLE}:load"]
    command += ["-o", f"{tmp_path}/t", "--routers"]
    for name, match in (
        ("ROUTERS", "mine.py:ROUTERS is a int, not a RouterSpec or a list of them"),
        ("NAMES", "routers takes RouterSpecs, not str"),
    ):
        result = CliRunner().invoke(app, [*command, f"{tmp_path}/mine.py:{name}"])
        assert match in f"{result.output} {result.exception}"


def test_a_loader_of_a_model_that_states_no_positions_is_told_what_to_give(tmp_path: Path) -> None:
    """Its config may be one of transformers without the model being so."""
    file = tmp_path / "mine.py"
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(own.EXAMPLE.parent)!r})\n"
        "from transformers import PretrainedConfig\nfrom your_own_moe import GPT, Bytes\n"
        "def load():\n    model = GPT()\n    model.config = PretrainedConfig()\n"
        "    return model, Bytes()\n"
    )
    text = tmp_path / "long.txt"
    text.write_text("word " * 200)
    command = ["trace", "--loader", f"{file}:load", "--data", str(text), "-o", str(tmp_path / "t")]
    result = CliRunner().invoke(app, command)
    assert "IndexError: index out of range in self (no max_position" in str(result.exception)
    assert CliRunner().invoke(app, [*command, "--max-length", "100"]).exit_code == 0
