"""Every family that the installed transformers ships: traced exactly, adapted, or refused by name.
What routed where is found without the hook: an expert is disturbed, and the positions whose layer
output changes are those that went to it."""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections import Counter
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import moe_inspect
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.find import find_routers
from moe_inspect.model.routers import Site
from tests.conftest import ROOT, write_between_marks
from tests.support import zoo
from tests.support.sweep import WHOLE, sample
from tests.test_cli_trace import save_tokenizer

FAMILIES_PAGE = ROOT / "benchmarks/results/families.md"

pytestmark = pytest.mark.usefixtures("nothing_is_compiled")

BUILT = [f for f in zoo.FAMILIES if f not in zoo.WHY_NOT]
LENGTHS = [9, 5, 12]
# Families whose code differs from all others' (two routers a layer, whose output is sorted by
# expert; identity experts; tokens that skip experts; router and experts in one function; experts
# that run whatever the router chooses; two stacks; hashed ids; layers that run twice; no
# interface): of the many that do not, `make test` runs three.
ODD = {"jetmoe", "longcat_flash", "zaya", "doge", "nllb_moe", "switch_transformers", "deepseek_v4"}
ODD |= {"inkling", "inkling2_loop", "llama4", "dbrx"}
SAMPLED = sorted(set(BUILT) & {*sample(BUILT, 35), *ODD})
TOWERS = [family for family in zoo.WITH_TOWERS if WHOLE or family in ("llama4", "qwen3_5_moe")]
# what these do with the router's choice cannot be told from outside by disturbing an expert: an
# expert of doge is a row of an embedding, and a layer of inkling2_loop that is disturbed in its
# first run routes otherwise in its second; both have a test of their own below
UNDISTURBED = {"doge", "inkling2_loop"}

# record refuses them: of the last two, as routers return probabilities
NO_LOGITS = {"doge", "longcat_flash", "zaya", "diffusion_gemma", "gemma4"}
built = cache(zoo.build)  # hooks and interventions leave a model as it was


def batch(family: str) -> dict[str, torch.Tensor]:
    return zoo.inputs(family, LENGTHS[:1] if family in zoo.ALONE else LENGTHS)


def made(family: str, lengths: list[int] | None = None) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model and a batch for it."""
    if family not in BUILT:
        pytest.skip(f"no {family} in this release, or it crashes")
    return zoo.build(family), zoo.inputs(family, lengths) if lengths else batch(family)


def slots(trace: moe_inspect.Trace, router: int, prefix: str) -> np.ndarray:
    table = trace.routing(router=router)
    names = [c for c in table if c.startswith(prefix)][: trace.routers[router].top_k]
    return table[names].to_numpy(np.float64)


def chosen_apart(trace: moe_inspect.Trace, router: int) -> float:
    """How much larger the logits of chosen experts are than the others', in standard deviations."""
    logits = trace.logits().query("router == @router")
    logits_TE = np.stack(logits["logits"].to_list()).astype(float)
    ids = trace.routing(router=router).set_index("token").loc[logits.token].filter(like="expert_")
    chosen_TE = (ids.to_numpy(float)[..., None] == np.arange(logits_TE.shape[1])).any(1)
    return (logits_TE[chosen_TE].mean() - logits_TE[~chosen_TE].mean()) / logits_TE.std()


def fed_to(site: Site, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """bool [T]: the rows that reach a router, no padding. A decoder's have none here."""
    if site.stack == "decoder":
        return np.ones(inputs["decoder_input_ids"].numel(), bool)
    return inputs["attention_mask"].flatten().bool().numpy()


def last_matrices(owner: torch.nn.Module, experts: int) -> list[torch.Tensor]:
    """The last matrix of each expert."""
    if isinstance(owner, torch.nn.ModuleDict):
        of_experts = [expert for name, expert in owner.items() if name.startswith("expert_")]
        return [[p for p in e.parameters() if p.dim() == 2][-1].detach() for e in of_experts]
    parameters = list(owner.parameters())
    stacked = [p for p in parameters if p.dim() == 3 and len(p) >= experts]
    stacked = stacked or [p.view(experts, -1, p.shape[1]) for p in parameters if p.dim() == 2]
    return list(stacked[-1].detach())


def disturbed(model: Any, site: Site, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """bool [T, E]: the positions whose output changes when an expert's last matrix does. The output
    of the block that holds the experts, or where that does not run by itself of the whole layer."""
    T = len(fed_to(site, inputs))
    parent = model.get_submodule(site.path.rpartition(".")[0])
    owner = parent if site.adapter is not None and not site.adapter.at_call else site.module
    inside = re.match(r".*?(?:layers|blocks|block|h)\.\d+(?=\.)", site.path)
    last = last_matrices(owner, site.experts)
    seen: dict[str, list[torch.Tensor]] = {"block": [], "layer": []}

    def watch(name: str, module: Any, args: Any, out: Any) -> None:
        seen[name].append((out[0] if isinstance(out, tuple) else out).reshape(T, -1))

    with ExitStack() as hooks, torch.no_grad():
        for name, module in (("block", parent), ("layer", model.get_submodule(inside[0]))):
            hooks.callback(module.register_forward_hook(partial(watch, name)).remove)
        model(**inputs)
        for e in range(site.experts):
            kept = last[e].clone()
            last[e] *= -3
            model(**inputs)
            last[e].copy_(kept)
    outputs = seen["block"] or seen["layer"]
    return np.stack([(x != outputs[0]).any(-1).numpy() for x in outputs[1:]], 1)


def handed_over(
    model: Any, sites: list[Site], inputs: dict[str, torch.Tensor]
) -> list[np.ndarray | None]:
    """The gate weights [T, K] that each experts module is called with, −inf where a slot names no
    expert; None where a router's own output was read."""
    received: dict[int, np.ndarray] = {}

    def watched(r: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in (*args, *kwargs.values()) if torch.is_tensor(t)][1:]
        ids = next((t for t in tensors if not t.dtype.is_floating_point and t.dim() == 2), None)
        if ids is not None:
            fits = (t for t in tensors if t.dtype.is_floating_point and t.shape == ids.shape)
            nowhere = (ids < 0) | (ids >= sites[r].experts)
            received[r] = next(fits).float().masked_fill(nowhere, -torch.inf).numpy()
        return forward(*args, **kwargs)

    with ExitStack() as undo, torch.no_grad():
        for r, site in enumerate(sites):
            # not of masks
            if site.adapter is None or (site.adapter.at_call and not site.adapter.top_k):
                site.module.forward = partial(watched, r, site.module.forward)
                undo.callback(delattr, site.module, "forward")
        model(**inputs)
    return [received.get(r) for r in range(len(sites))]


TEXTS = ["the cat sat on a mat", "two dogs ran home again and the old moon rose", "every roof"]


@cache
def found(family: str, with_towers: bool = False) -> tuple[str, str, Any]:
    """(class that was loaded, how: dispatch and tap, tap, adapter or why not, (tokens, routing) as
    `moe-inspect trace` has them, from a directory that holds the model and a tokenizer)."""
    if family in zoo.WHY_NOT:
        return "", f"refused: {zoo.WHY_NOT[family]}", None
    model, refused = zoo.build_with_towers(family) if with_towers else built(family), ""
    adapter = next((s.adapter for s in find_routers(model) if s.adapter is not None), None)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path, texts = f"{folder}/model", Path(folder) / "texts.jsonl"
        model.save_pretrained(path)
        save_tokenizer(Path(path))
        texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        for capture, said in (("dispatch", "dispatch, tap"), ("tap", "tap")):
            how: dict[str, Any] = {"data": [str(texts)], "capture": capture, "overwrite": True}
            try:
                trace = moe_inspect.trace_model(path, f"{folder}/trace", **how)
            except MoeInspectError as error:
                refused = str(error).replace(folder, "")
                continue
            if adapter is not None:
                said = f"adapter: {adapter.note}" if adapter.note else "adapter"
            return trace.manifest["model"]["class"], said, (trace.tokens(), trace.routing())
    return "", f"refused: {refused}", None


@pytest.mark.parametrize("family", SAMPLED)
def test_what_is_said_of_the_routers(family: str) -> None:
    model = built(family)
    sites = find_routers(model)
    for site in sites:
        assert site.experts in (8, 16)
        assert site.scoring in ("softmax", "sigmoid", "sparsemixer", "sqrtsoftplus")
        block = model.get_submodule(site.path.rpartition(".")[0])
        shared = [name for name, _ in block.named_parameters() if "shared" in name]
        assert site.shared_experts or not shared, shared[:1]
    a_layer = Counter((site.stack, site.layer) for site in sites)
    assert set(a_layer.values()) == {2 if family == "jetmoe" else 1}


@pytest.mark.parametrize("family", SAMPLED)
def test_recorded_is_what_executed(family: str, tmp_path: Path) -> None:
    model, inputs = built(family), batch(family)
    bare, sites, how = zoo.outputs(model, inputs), find_routers(model), found(family)[1]
    traces, logits = [], family not in NO_LOGITS
    for capture in ("tap", "dispatch") if how == "dispatch, tap" else ("tap",):
        with moe_inspect.record(model, tmp_path / capture, capture=capture, logits=logits):
            outputs = zoo.outputs(model, inputs)
        close = 1e-5 if capture == "dispatch" else 0.0  # which adds up in another order
        assert torch.allclose(bare, outputs, atol=close, rtol=close)
        traces.append(trace := moe_inspect.open_trace(tmp_path / capture))
        by_stack = {site.stack: fed_to(site, inputs).sum() for site in sites}
        assert trace.n_tokens == sum(by_stack.values())
        assert len(trace.routers) >= len(sites)
        assert {r.layer for r in trace.routers} == {s.layer for s in sites}
        # each decision's slots are in descending weight, those that routed nowhere last
        for r, router in enumerate(trace.routers):
            assert trace.manifest["routers"][r]["slot_order"] == router.slot_order == "weight"
            key = np.nan_to_num(slots(trace, r, "weight_"), nan=-np.inf)
            assert (key[:, :-1] >= key[:, 1:]).all(), router.path
        experts, path = trace.routing().filter(like="expert_"), tmp_path / f"{capture} ids"
        without = zoo.recorded(model, path, inputs, capture=capture, weights=False).routing()
        assert without[list(experts)].equals(experts)
    trace = traces[0]
    assert traces[-1].routing().equals(trace.routing())
    if logits and family != "nllb_moe":  # which runs experts 1 and 0
        apart = np.sort([chosen_apart(trace, r) for r in range(len(trace.routers))])
        assert apart[family == "deepseek_v4" :].min() > 1, "a table of ids chooses in one layer"
    if family in UNDISTURBED:
        return
    executed = handed_over(model, sites, inputs)
    assert any(w is not None for w in executed) or how.startswith("adapter")
    for r, site in enumerate(sites):
        ids, weights = (slots(trace, r, prefix) for prefix in ("expert_", "weight_"))
        real = fed_to(site, inputs)
        if (w := executed[r]) is not None:
            there, ordered = ~np.isnan(ids), -np.sort(-w[real], axis=1)
            # 2^-25 is half the step of the smallest half-precision numbers
            slack = 2**-10 * np.abs(ordered) + 2**-25
            assert (np.abs(weights - ordered) <= slack)[there].all()
        # a weight of zero leaves no trace in the output
        ids_of_some = np.where(weights != 0, ids, np.nan)
        chosen = (ids_of_some[..., None] == np.arange(site.experts)).any(1)
        changed = disturbed(model, site, inputs)[real]
        assert (chosen == changed).all(), f"{site.path}: {(chosen != changed).sum()}"
        assert np.isnan(ids).sum() == 0 or family in ("zaya", "longcat_flash")


@pytest.mark.parametrize(
    ("family", "with_towers"), [(f, False) for f in SAMPLED] + [(f, True) for f in TOWERS]
)
def test_a_saved_model_routes_as_the_one_that_was_saved(
    family: str, with_towers: bool, tmp_path: Path
) -> None:
    """As `moe-inspect trace` recorded it."""
    tokens, routing = found(family, with_towers)[2]
    model = zoo.build_with_towers(family) if with_towers else zoo.build(family)
    for name, buffer in model.named_buffers():
        if name.endswith("balancing_biases"):
            # of Zaya's choice to skip: transformers sets it so while loading, whatever was saved
            buffer[-1] = -1.0
    if "encode" in set(tokens.phase):
        return  # what its decoder is fed, the command makes: tests/test_seq2seq.py
    if family == "llama4" and with_towers:
        # the whole one's own forward fails on text alone in transformers 5.24
        model = model.language_model
    rows = [rows.token_id.tolist() for _, rows in tokens.groupby("sequence", sort=False)]
    assert len(rows) == len(TEXTS)
    with moe_inspect.record(model, tmp_path / "t", capture="tap"), torch.no_grad():
        for batch in [[row] for row in rows] if family in zoo.ALONE else [rows]:
            longest = max(map(len, batch))
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
            padded = torch.tensor([row + [0] * (longest - len(row)) for row in batch])
            model(input_ids=padded, attention_mask=mask)
    again = moe_inspect.open_trace(tmp_path / "t").routing()
    ids = [c for c in routing if c.startswith("expert_")]
    assert again[ids].fillna(-1).equals(routing[ids].fillna(-1))


def tokens_in_order(trace: moe_inspect.Trace) -> Any:
    """By stack, then as fed: a batch of an encoder-decoder is all that its encoder reads, then all
    that its decoder does."""
    tokens = trace.tokens()
    by = ["encoded", "token"]
    return tokens.assign(encoded=tokens.phase == "encode").sort_values(by, ignore_index=True)


@pytest.mark.parametrize("family", [f for f in SAMPLED if f not in zoo.ALONE])
def test_a_document_routes_alone_as_in_a_batch(family: str, tmp_path: Path) -> None:
    model, inputs = built(family), batch(family)
    together = zoo.recorded(model, tmp_path / "together", inputs)
    rows = [zoo.alone(inputs, row, length) for row, length in enumerate(LENGTHS)]
    alone = zoo.recorded(model, tmp_path / "alone", *rows, capture="tap")
    batched, single = tokens_in_order(together), tokens_in_order(alone)
    for name in ("token_id", "position"):
        assert batched[name].equals(single[name])
    # the same tokens share a document; numbers differ if a sequence began with an unknown origin
    assert (pd.factorize(batched["document"])[0] == pd.factorize(single["document"])[0]).all()
    assert together.manifest["counts"].get("unlinked") == alone.manifest["counts"].get("unlinked")
    for r in range(len(together.routers)):
        a, b = (np.sort(slots(t, r, "expert_"), 1) for t in (together, alone))
        # products of another shape round otherwise
        assert (np.nan_to_num(a, nan=-1) == np.nan_to_num(b, nan=-1)).mean() > 0.98


@pytest.mark.parametrize("family", SAMPLED)
def test_each_is_intervened_in(family: str, tmp_path: Path) -> None:
    """By its own trace, another's, none of an expert, one expert always."""
    model, inputs = built(family), batch(family)
    paths = [site.path for site in find_routers(model)]
    before = zoo.outputs(model, inputs)
    trace = zoo.recorded(model, tmp_path / "a", inputs)
    with moe_inspect.intervene(model, replay=trace) as done:
        assert torch.equal(zoo.outputs(model, inputs), before)
    assert not done.table()[["decisions", "assignments", "weights"]].to_numpy().any()
    other = zoo.build(family, seed=1)
    with moe_inspect.intervene(other, replay=trace):
        again = zoo.recorded(other, tmp_path / "b", inputs)
    assert moe_inspect.compare(trace, again).tables["agreement"].set_mismatch.max() == 0
    with moe_inspect.intervene(model, shuffle=1):
        assert not torch.equal(zoo.outputs(model, inputs), before)
    with moe_inspect.intervene(model, drop={path: [0, 1] for path in paths}):
        without = zoo.recorded(model, tmp_path / "d", inputs)
    with moe_inspect.intervene(model, force=dict.fromkeys(paths, 2)):
        forced = zoo.recorded(model, tmp_path / "f", inputs)
    for r in range(len(trace.routers)):
        ids, weights = slots(without, r, "expert_"), slots(without, r, "weight_")
        assert not (np.isin(ids, [0, 1]) & (weights > 0)).any()
        ids = slots(forced, r, "expert_")
        # (what skips Zaya's experts has no weight that an expert could take over)
        assert ((ids == 2).any(1) | np.isnan(ids).all(1)).all()
        assert (ids == 2).any()
    assert torch.equal(zoo.outputs(model, inputs), before)


# --- the quirks


@pytest.mark.parametrize("family", ["zaya", "longcat_flash"])
def test_a_skipped_token_or_an_identity_expert_is_routed_nowhere(
    family: str, tmp_path: Path
) -> None:
    model, inputs = made(family, [200])
    trace = zoo.recorded(model, tmp_path / "t", inputs)
    ids, weights = (trace.routing().filter(like=c) for c in ("expert_", "weight_"))
    nowhere = ids.isna().to_numpy()
    assert 0 < nowhere.sum() < ids.size
    assert (nowhere == weights.isna()).all(axis=None)
    assert (weights.to_numpy()[~nowhere] > 0).all()
    assert {r.experts for r in trace.routers} == {ids.max(axis=None) + 1} == {8}


def test_doge_looks_up_what_is_recorded(tmp_path: Path) -> None:
    model, inputs = made("doge")
    looked_up: list[np.ndarray] = []
    for path, module in model.named_modules():
        if path.endswith("down_embed"):
            module.register_forward_hook(lambda m, a, out: looked_up.append(a[0].numpy().copy()))
    trace = zoo.recorded(model, tmp_path / "t", inputs)
    assert len(trace.routers) == len(looked_up) == 4
    for r, ids in enumerate(looked_up):
        assert (slots(trace, r, "expert_") == ids.reshape(-1, 3)).all()


def test_two_routers_in_a_block(tmp_path: Path) -> None:
    model, inputs = made("jetmoe")
    routers = zoo.recorded(model, tmp_path / "t", inputs).routers
    assert [r.layer for r in routers] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert ["self_attention" in r.path for r in routers] == [True, False] * 4


def test_a_layer_that_runs_twice_is_two_routers(tmp_path: Path) -> None:
    model, inputs = made("inkling2_loop")
    seen: dict[str, list[np.ndarray]] = {}
    sites = find_routers(model)

    def watched(path: str, forward: Any, hidden: Any, ids: Any, weights: Any) -> Any:
        seen.setdefault(path, []).append(ids.numpy().copy())
        return forward(hidden, ids, weights)

    for site in sites:
        site.module.forward = partial(watched, site.path, site.module.forward)
    with moe_inspect.record(model, counts_only=True) as recorder, torch.no_grad():
        model(**inputs)
    first = dict(seen)
    trace = zoo.recorded(model, tmp_path / "t", inputs, inputs, capture="tap")
    real = inputs["attention_mask"].flatten().bool().numpy()
    runs = [(site.path, time) for site in sites for time in range(len(first[site.path]) // 3)]
    assert len(trace.routers) == len(recorder.balance()) == len(runs) > len(sites)
    names = [path + (f" (run {time + 1})" if time else "") for path, time in runs]
    assert [r.path for r in trace.routers] == names
    for r, (path, time) in enumerate(runs):
        both = np.sort(slots(trace, r, "expert_"), 1).reshape(2, real.sum(), -1)  # two passes
        assert (both == np.sort(first[path][time][real], 1)).all()


def test_what_an_expert_has_no_room_for_is_routed_nowhere(tmp_path: Path) -> None:
    """The truth by disturbing experts; by the router's logits: tests/test_families_drop.py."""
    model = zoo.build("switch_transformers", expert_capacity=4)
    inputs = zoo.inputs("switch_transformers", [60])
    trace = zoo.recorded(model, tmp_path / "t", inputs)
    chosen = slots(trace, 0, "expert_") == np.arange(8)
    assert (chosen == disturbed(model, find_routers(model)[0], inputs)).all()


def test_nllb_weighs_by_its_two_first_choices(tmp_path: Path) -> None:
    """And runs experts 1 and 0 whatever they are, which disturbing them shows above."""
    model, inputs = made("nllb_moe")
    logits: list[torch.Tensor] = []
    router = find_routers(model)[0].logits_module
    router.register_forward_hook(lambda m, a, out: logits.append(out[2]))
    trace = zoo.recorded(model, tmp_path / "t", inputs)
    expected = logits[0].topk(2, dim=1).values.softmax(1).numpy()
    assert np.abs(slots(trace, 0, "weight_") - expected).max() < 2**-10
    assert (slots(trace, 0, "expert_") == [1, 0]).all()


def test_the_page_says_what_the_tests_found() -> None:
    """Rows of benchmarks/results/families.md, for the families that run here. None is refused but
    those that are known to be."""
    page = FAMILIES_PAGE.read_text()
    known = set(zoo.FAMILIES) & set(zoo.WHY_NOT)
    assert len(zoo.FAMILIES) >= 64
    assert {f for f in {*SAMPLED, *known} if not found(f)[0]} == known
    assert all(found(f, True)[0] for f in TOWERS)
    if f"of transformers {zoo.hf.__version__}, " in page:
        table = [line[2:-2].split(" | ") for line in page.splitlines() if line.startswith("| ")]
        stated = {(name, *row[:2]) for row in table if len(row) == 3 for name in row[2].split(", ")}
        rows = [row(family) for family in {*SAMPLED, *known}]
        stale = {(zoo.family_label(*row[:2]), *row[2:]) for row in rows} - stated
        assert not stale, "benchmarks/results/families.md is stale: run make test-families"
        assert not WHOLE or section() in page


def row(family: str) -> tuple[str, ...]:
    loaded, how, *_ = found(family)
    return family, loaded, how, zoo.dropped(built(family)) if family in BUILT else ""


def section() -> str:
    with_towers = {family: found(family, True)[:2] for family in zoo.WITH_TOWERS}
    return zoo.families_section([row(family) for family in zoo.FAMILIES], with_towers)


if __name__ == "__main__":
    write_between_marks(FAMILIES_PAGE, "families", section())
