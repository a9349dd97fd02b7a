"""Ablation: the loss without an expert, against that of each text alone under an intervention."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import moe_inspect
from moe_inspect import MoeInspectError, ablate
from moe_inspect.capture.corpus.plan import TokenSequence
from moe_inspect.capture.options import TraceOptions
from moe_inspect.interventions import ablation
from moe_inspect.interventions.ablation import Below, HeldOut, open_held_out
from tests.conftest import Cli
from tests.support import own, zoo
from tests.test_cli_trace import save_tokenizer
from tests.test_oracles_report import resampled


def choice(router: Any, args: Any, kwargs: Any, logits: torch.Tensor) -> Any:
    weights, ids = logits.softmax(-1).topk(2)
    return ids, weights / weights.sum(-1, keepdim=True)


ROUTERS = [moe_inspect.RouterSpec(module="blocks.*.experts.router", choice=choice, experts=8)]
# in float32, where a text's loss does not depend on the texts beside it
SMALL = TraceOptions(max_tokens=1500, batch_tokens=512, dtype="float32")


@pytest.fixture(scope="module")
def opened() -> HeldOut:
    return open_held_out("demo", SMALL)


def test_the_tables_are_of_each_text_alone_without_the_expert(opened: HeldOut) -> None:
    """Of documents of several sequences, five or more of each domain."""
    options = replace(SMALL, max_tokens=5_400, max_length=100)
    done = ablate("demo", options, layers=[1, 2], experts=[3])
    network, batches = opened.network, open_held_out("demo", options).batches
    texts = [row for batch in batches for row in batch]

    @torch.no_grad()
    def nats() -> list[float]:
        ids = [torch.tensor(row.ids.astype(int))[None] for row in texts]
        return [float(network(input_ids=x, labels=x).loss) * (x.shape[1] - 1) for x in ids]

    facts = [(row.document, row.domain, len(row.ids) - 1) for row in texts]
    of = pd.DataFrame(facts, columns=["document", "domain", "tokens"]).assign(whole=nats())
    asked = list(product((1, 2), (3,)))
    for layer, expert in asked:
        with moe_inspect.intervene(network, drop={layer: expert}):
            of[layer, expert] = nats()
    documents = of.groupby(["document", "domain"], as_index=False).sum()

    def row(of: pd.DataFrame, layer: int, expert: int) -> dict[str, Any]:
        tokens, without = of["tokens"].sum(), of[layer, expert]
        strata = pd.factorize(of["domain"], sort=True)[0]
        assert np.bincount(strata).min() >= 5
        weights = resampled(tuple(strata.tolist()))
        drawn = weights @ (without - of["whole"]) / (weights @ of["tokens"])
        ends = np.quantile(drawn, [0.025, 0.975])
        found = {"layer": layer, "router": layer, "expert": expert, "how": "chose among the rest"}
        found |= {"documents": len(of), "tokens": tokens, "loss": of["whole"].sum() / tokens}
        found |= {"loss_without": without.sum() / tokens, "difference_low": ends[0]}
        found["difference_high"] = ends[1]
        return found | {"difference": found["loss_without"] - found["loss"]}

    domains = [(name, part) for name, part in documents.groupby("domain")]
    by_domain = [
        row(part, *pair) | {"domain": name} for pair, (name, part) in product(asked, domains)
    ]
    for table, rows in (
        (done.experts, [row(documents, *pair) for pair in asked]),
        (done.domains, by_domain),
    ):
        expected = pd.DataFrame(rows)[[*table]]
        pd.testing.assert_frame_equal(table, expected, check_dtype=False, rtol=0, atol=2e-5)


def test_skipping_what_is_below_changes_nothing_and_computes_less(opened: HeldOut) -> None:
    site, ran = opened.sites[2], []
    below = Below(opened.network, [site])
    hooks = [
        m.register_forward_hook(lambda *a, n=n: ran.append(n))
        for n, m in enumerate(b.mlp for b in opened.network.model.layers)
    ]
    with below.remembered():
        whole = opened.losses(0)
    with below.skipped(site):
        again = opened.losses(0)
    assert ran == [0, 1, 2, 3, 2, 3]
    assert np.array_equal(whole, again)
    for hook in hooks:
        hook.remove()
    assert not any("forward" in vars(block) for block in opened.network.model.layers)


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path, cli_here: Cli) -> None:
    arguments: list[object] = ["demo", "--layers", "1,2", "--experts", "0-2", "--max-tokens", 1500]
    arguments += ["--batch-tokens", 512, "--dtype", "float32", "--resume", tmp_path / "kept"]
    at_once = ablate("demo", SMALL, layers=[1, 2], experts=[0, 1, 2])
    few = cli_here("ablate", *arguments, "--most-passes", 3, check=1)
    assert "--most-passes 3 is not enough for one batch, which takes 7" in few.stderr
    first = cli_here("ablate", *arguments, "--most-passes", 8)
    assert "measured on 1 of 4 batches" in first.stderr
    losses = tmp_path / "kept" / "losses.jsonl"
    losses.write_bytes(losses.read_bytes()[:-20])  # killed while it wrote the last line
    done = cli_here("ablate", *arguments)
    assert f"{at_once.passes - 5} forward passes" in done.stdout
    cli_here("ablate", *arguments, "-o", "out.json", "--html", "page.html")
    assert "chose among the rest" in (tmp_path / "page.html").read_text()
    table = pd.read_json(tmp_path / "out.json", lines=True)
    expected = at_once.experts
    assert list(table) == list(expected)
    columns = ["expert", "loss", "loss_without", "difference_low"]
    assert np.allclose(table[columns], expected[columns])
    again = cli_here("ablate", *arguments, "--format", "csv")
    assert " 0 forward passes" in cli_here("ablate", *arguments).stdout
    assert "chose among the rest" in again.stdout
    other = cli_here("ablate", *arguments, "--max-tokens", 300, check=1)
    assert "losses of a different max_tokens (1500, now 300)" in other.stderr


def test_what_cannot_be_ablated_is_said(tmp_path: Path) -> None:
    for match, given in (("no expert 9", {"experts": [9]}), ("in layer 7", {"layers": [7]})):
        with pytest.raises(MoeInspectError, match=match):
            ablate("demo", SMALL, **given)
    save_tokenizer(tmp_path)
    zoo.config("switch_transformers").save_pretrained(tmp_path)
    with pytest.raises(MoeInspectError, match="has an encoder and a decoder, and no loss"):
        ablate(str(tmp_path), replace(SMALL, random_init=0))
    # (what tells labels from tokens is the width of the logits)
    row = TokenSequence(0, 0, "a", "s", np.arange(9, dtype=np.int32), 9, 1)
    with pytest.raises(MoeInspectError, match="does not predict the next token"):
        ablation._loss(torch.zeros(9, 8), row, "Labels")


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    """Of a loader, fed a text at a time; against the loss with one expert's logit masked."""
    torch.save(own.gpt().state_dict(), tmp_path / "model.pt")
    options = TraceOptions(loader=own.example().load, routers=ROUTERS)
    options = replace(options, max_tokens=600, batch_tokens=2048)
    checkpoint = str(tmp_path / "model.pt")
    opened = open_held_out(checkpoint, options)
    row = ablate(checkpoint, options, layers=[2], experts=[5]).tables["experts"].iloc[0]
    assert row["how"] == "chose among the rest"
    model = own.gpt().eval()
    rows = [torch.from_numpy(row.ids.astype(int)) for batch in opened.batches for row in batch]

    def loss() -> float:
        logits = torch.cat([model(ids[None])[0, :-1] for ids in rows])
        return float(torch.nn.functional.cross_entropy(logits, torch.cat([x[1:] for x in rows])))

    with torch.no_grad():
        whole = loss()
        hook = model.blocks[2].experts.router.register_forward_hook(
            lambda m, a, logits: logits.index_fill(-1, torch.tensor(5), float("-inf"))
        )
        without = loss()
        hook.remove()
    assert (row["loss"], row["loss_without"]) == pytest.approx((whole, without), abs=1e-6)
    assert whole != without
