"""What the weights say, in the checkpoints of every family, and how the report names them."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import moe_inspect
from moe_inspect.analysis.weights import measure, stored
from moe_inspect.analysis.weights.measure import aimer_and_norm, geometry_of, places_in, rows_of
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.find import find_routers
from moe_inspect.reporting.tables.summary import adapter, quantization
from moe_inspect.trace.manifest import read_manifest
from moe_inspect.trace.schema import Router
from tests.conftest import Cli
from tests.support import zoo
from tests.support.damage import edit_manifest
from tests.support.families import FAMILIES, build
from tests.support.planted import uniform
from tests.support.synthetic import uniform_ids, write_trace

# in all of these transformers packs, splits, renames or transposes what is stored
OTHERS = ("dbrx", "jetmoe", "step3p7", "gemma4", "switch_transformers", "zaya", "aria")
SPLIT = ("gate_up_proj", "down_proj")


def aimer(w: torch.Tensor) -> float:
    """By torch, as it is defined."""
    return (w.abs().mean() / w.square().mean().sqrt()).item()


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "PIECE", 320)


def saved(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def described(tensors: dict[str, torch.Tensor], root: Path) -> dict[str, pd.DataFrame]:
    save_file(tensors, root / "model.safetensors")
    return moe_inspect.describe_weights(str(root))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_found_and_measured(family: str, tmp_path: Path):
    """By torch, of the parameters of the model in memory."""
    model = build(family)
    places, sites = places_in(saved(model, tmp_path)), find_routers(model)
    assert [(p.layer, p.experts) for p in places] == [(s.layer, s.experts) for s in sites]
    for place, site in zip(places, sites, strict=True):
        rows_EH = rows_of(place)
        assert rows_EH is not None
        assert site.logits_module is not None
        weights = [p for n, p in site.logits_module.named_parameters() if p.dim() == 2]
        assert any(torch.equal(w.double(), torch.from_numpy(rows_EH)) for w in weights)
        experts = model.get_submodule(f"{site.path.rpartition('.')[0]}.experts")
        matrices = [p.detach().double() for p in experts.parameters() if p.dim() == 3]
        assert matrices
        aimer_E, norm_E = aimer_and_norm(place)
        for e in range(site.experts):
            w = torch.cat([m[e].flatten() for m in matrices])
            assert norm_E[e] == pytest.approx(w.norm().item(), rel=1e-9)
            assert aimer_E[e] == pytest.approx(aimer(w))
        assert len(set(np.round(aimer_E, 9))) == site.experts  # no expert for another


@pytest.mark.parametrize("family", OTHERS)
def test_experts_that_are_stored_otherwise(family: str, tmp_path: Path):
    model = zoo.build(family)
    places, sites = places_in(saved(model, tmp_path)), find_routers(model)
    assert [(p.layer, p.experts) for p in places] == [(s.layer, s.experts) for s in sites]
    assert all((rows_of(p) is None) == (family == "zaya") for p in places)
    assert all(np.isfinite(aimer_and_norm(p)[0]).all() for p in places)
    # every weight of the experts is in one of them
    weights = sum(n for p in places for of in p.of_expert for _, _, n in of)
    of_experts = re.compile(r"^(?!.*(?:shared|router)).*(?:experts|_linear).*(?<!bias)$")
    matrices = [p for n, p in model.named_parameters() if p.dim() > 1 and of_experts.search(n)]
    assert weights == sum(p.numel() for p in matrices)


def test_bf16_fp16_and_several_files_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = build("olmoe", torch.bfloat16)
    whole = moe_inspect.describe_weights(str(saved(model, tmp_path / "a")))
    want = model.model.layers[1].mlp.experts.down_proj.detach().double()
    monkeypatch.setattr(stored, "PIECE", 320)
    model.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    pieces = moe_inspect.describe_weights(str(tmp_path / "b"))
    for name in ("routers", "experts"):
        pd.testing.assert_frame_equal(whole[name], pieces[name])
    place = places_in(tmp_path / "b")[1]
    down = [t for t, _, _ in place.of_expert[3] if t.shape == tuple(want[3].shape)]
    assert any(np.array_equal(t.whole(), want[3].numpy()) for t in down)
    model.half().save_pretrained(tmp_path / "c")
    half = moe_inspect.describe_weights(str(tmp_path / "c"))["experts"]
    assert half["aimer"].tolist() == pytest.approx(whole["experts"]["aimer"].tolist(), rel=1e-4)


def test_geometry_by_hand():
    found = geometry_of(np.array([[3.0, 0, 0, 0], [0, 4, 0, 0], [1, 1, 0, 0]]))
    assert found["cosine_max"] == pytest.approx(2**-0.5)
    assert found["cosine_mean"] == pytest.approx(2 * 2**-0.5 / 3)
    assert (found["row_norm_min"], found["row_norm_max"]) == (pytest.approx(2**0.5), 4)
    assert measure.effective_rank(np.eye(5, 9)) == pytest.approx(5)
    assert measure.effective_rank(np.ones((5, 9))) == pytest.approx(1)
    assert np.isnan(measure.effective_rank(np.zeros((2, 3))))
    assert np.isnan(geometry_of(np.zeros((3, 4)))["cosine_max"])


def test_random_rows_are_what_chance_gives():
    rng = np.random.default_rng(9)
    most, rank = measure.random_geometry(16, 64)
    drawn = [geometry_of(rng.standard_normal((16, 64)) * 0.02) for _ in range(40)]
    assert most == pytest.approx(np.mean([d["cosine_max"] for d in drawn]), rel=0.1)
    assert rank == pytest.approx(np.mean([d["effective_rank"] for d in drawn]), rel=0.02)
    assert np.mean([d["cosine_mean"] for d in drawn]) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("scales", ["block", "row", "one"])
def test_fp8_with_its_scales(scales: str, tmp_path: Path, in_pieces: None):
    torch.manual_seed(0)
    tensors, want = {"model.layers.0.mlp.gate.weight": torch.randn(4, 16)}, []
    for e in range(4):
        w = torch.randn(200, 300).to(torch.float8_e4m3fn)
        shape = {"block": (2, 3), "row": (200, 1), "one": (1,)}[scales]
        scale = torch.rand(shape) + 0.1
        name = f"model.layers.0.mlp.experts.{e}.down_proj.weight"
        tensors[name] = w
        tensors[name + ("_scale_inv" if scales == "block" else "_scale")] = scale
        if scales == "block":
            scale = scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
        want.append(aimer((w.float() * scale).double()))
    experts = described(tensors, tmp_path)["experts"]
    assert experts["aimer"].tolist() == pytest.approx(want, rel=1e-6)
    assert experts["weights"].tolist() == [200 * 300] * 4


def test_every_byte_of_fp8_is_what_torch_reads():
    codes = torch.arange(256, dtype=torch.uint8)
    want = codes.view(torch.float8_e4m3fn).double().numpy()
    np.testing.assert_array_equal(stored._fp8_values(), want)  # pyright: ignore[reportPrivateUsage]


def test_mxfp4_is_what_transformers_reads(tmp_path: Path, in_pieces: None):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (4, 24, 2, 16), dtype=torch.uint8)
    scales = torch.randint(118, 126, (4, 24, 2), dtype=torch.uint8)
    place = "model.layers.0.mlp"
    tensors = {
        f"{place}.router.weight": torch.randn(4, 16),
        f"{place}.router.bias": torch.randn(4),
        f"{place}.experts.down_proj_blocks": blocks,
        f"{place}.experts.down_proj_scales": scales,
        f"{place}.experts.down_proj_bias": torch.randn(4, 24),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    real = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).double()
    want = [aimer(w) for w in real]
    experts = moe_inspect.describe_weights(str(tmp_path))["experts"]
    assert experts["aimer"].tolist() == pytest.approx(want, rel=1e-6)
    assert experts["weight_norm"].tolist() == pytest.approx([w.norm().item() for w in real])
    assert experts["weights"].tolist() == [24 * 64] * 4


def test_quantised_experts_are_nan_and_their_router_is_read(tmp_path: Path):
    tensors = {"model.layers.0.mlp.gate.weight": torch.randn(4, 16)}
    for e in range(4):
        quantised = torch.zeros(16, 8, dtype=torch.float8_e4m3fn)
        tensors[f"model.layers.0.mlp.experts.{e}.down_proj.weight"] = quantised
    tables = described(tensors, tmp_path)
    assert tables["experts"][["aimer", "weights"]].isna().all(axis=None)
    assert tables["experts"]["row_norm"].notna().all()
    assert tables["routers"]["effective_rank"].notna().all()


def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path: Path):
    def refused(name: str, match: str) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        with pytest.raises(MoeInspectError, match=match):
            moe_inspect.describe_weights(str(tmp_path / name))

    refused("empty", r"no weights in .*empty: it needs \*.safetensors")
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(4, 4)}, tmp_path / "a.safetensors")
    refused(".", "no experts among the tensors")
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**9, 2, 2], "data_offsets": [0, 4]}})
    lies = len(header).to_bytes(8, "little") + header.encode() + b"abcd"
    empty, list_, junk = b"\x05" + bytes(7) + b"{}", b"\x02" + bytes(7) + b"[]", b"x" * 99
    (tmp_path / "broken").mkdir()
    for content in (b"", empty, list_, junk, lies):
        (tmp_path / "broken" / "model.safetensors").write_bytes(content)
        why = r"a of shape \[1000000000, 2, 2\] has 4 bytes"
        refused("broken", why if content == lies else "is damaged or no safetensors file")
    file = saved(build("mixtral"), tmp_path / "cut") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50_000])
    refused("cut", r"it ends before model\.layers\.1")


def test_it_needs_no_torch():
    program = (
        "import sys, moe_inspect; moe_inspect.describe_weights('demo'); "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# --- the commands


def test_the_bundled_model_as_tables(cli_here: Cli):
    routers = cli_here("describe", "demo", "--weights", "--format", "json")
    rows = [json.loads(line) for line in routers.stdout.splitlines()]
    sizes = [(row["layer"], row["router"], row["experts"]) for row in rows]
    assert sizes == [(r, r, 8) for r in range(4)]
    assert 0 < rows[0]["effective_rank"] <= 8
    experts = cli_here("describe", "demo", "--weights", "--table", "experts", "--format", "csv")
    table = pd.read_csv(io.StringIO(experts.stdout))
    assert len(table) == 32
    assert table["aimer"].between(0.75, 0.8).all()  # nearly Gaussian: 0.798
    assert (table["nearest"] != table["expert"]).all()
    wrong = cli_here("describe", "demo", "--weights", "--context", "9", check=2)
    assert "leave out --context" in wrong.stderr


@pytest.mark.parametrize("beside", ["mtp", "talker.model"])
def test_aimer_is_not_that_of_blocks_beside_the_model(beside: str, tmp_path: Path):
    """They have numbers of their own, from 0."""
    model = zoo.build("qwen3_moe")
    routers = [Router(s.layer, "", s.path, s.experts, 2) for s in find_routers(model)]
    model.save_pretrained(tmp_path)
    indices = range(len(routers))
    want = measure.aimer_of(tmp_path, routers, indices)
    assert all(np.isfinite(aimer_E).all() for aimer_E in want.values())
    weights = load_file(tmp_path / "model.safetensors")
    at = f"model.layers.{routers[0].layer}."
    more = {
        name.replace("model", beside, 1): tensor * torch.arange(tensor.shape[-1])
        for name, tensor in weights.items()
        if name.startswith(at)
    }
    save_file(weights | more, tmp_path / "model.safetensors")
    assert len(places_in(tmp_path)) == len(routers) + 1, "control: they are experts"
    table = moe_inspect.describe_weights(str(tmp_path))["routers"]
    (apart,) = set(table["blocks"]) - {"model.layers"}
    assert apart == f"{beside}.layers"
    if beside == "mtp":
        assert list(table["blocks"])[-1] == apart
    got = measure.aimer_of(tmp_path, routers, indices)
    assert {r: got[r].tolist() for r in indices} == {r: want[r].tolist() for r in indices}


def test_worth_takes_aimer_from_the_weights(cli_here: Cli):
    sample = Path("sample_traces/balanced").absolute()
    want = moe_inspect.describe_weights("demo")["experts"]["aimer"].tolist()
    out = cli_here("report", sample, "--table", "worth", "--weights", "demo", "--format", "json")
    rows = [json.loads(line) for line in out.stdout.splitlines()]
    assert [row["aimer"] for row in rows] == want
    assert moe_inspect.report(sample).tables["worth"]["aimer"].isna().all()
    wrong = cli_here("report", sample, "--weights", "demo", check=2)
    assert "add --table worth" in wrong.stderr


def test_weights_of_another_model_are_refused(tmp_path: Path):
    ids = [uniform_ids(np.random.default_rng(1), 100, 12, 2)] * 2
    trace = write_trace(tmp_path / "t", ids, 12)
    made = moe_inspect.report(trace, weights=saved(build("mixtral"), tmp_path / "m"))
    with pytest.raises(MoeInspectError, match="are not of this trace's model"):
        made.tables["worth"]


# --- how the report names them: quantisation and adapter


def torchao(kind: Any) -> dict[str, Any]:
    return {"quant_method": "torchao", "quant_type": kind}


NAMES: dict[str, dict[str, Any]] = {
    "mxfp4": transformers.Mxfp4Config().to_dict(),
    "fp8": transformers.FineGrainedFP8Config().to_dict(),
    "bitsandbytes 4 bit": transformers.BitsAndBytesConfig(load_in_4bit=True).to_dict(),
    "bitsandbytes 8 bit": transformers.BitsAndBytesConfig(load_in_8bit=True).to_dict(),
    "torchao int8": torchao({"default": {"_type": "Int8WeightOnlyConfig", "_data": "int4"}}),
    "torchao int4": torchao({"default": {"_type": "Int8DynamicActivationInt4WeightConfig"}}),
    "torchao float8": torchao("float8_weight_only"),
    "torchao": torchao({"default": 3}),
    "gptq 4 bit": {"quant_method": "gptq", "bits": 4},
    "awq 4 bit": {"quant_method": "awq", "bits": 4},
    "compressed-tensors int4": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
    },
    "fbgemm_fp8": {"quant_method": "fbgemm_fp8"},
    "": {},
}


@pytest.mark.parametrize("name", NAMES)
def test_quantization_is_named(name: str) -> None:
    config = {"quantization_config": json.loads(json.dumps(NAMES[name], default=str))}
    for of_model in (config, {"text_config": config}):
        assert quantization({"model": {"config": of_model}}) == name


@pytest.mark.parametrize("odd", [None, 3, [], "mxfp4", {"quant_method": None}, {"bits": "4"}])
def test_what_is_no_quantization_is_not_named(odd: Any) -> None:
    assert quantization({"model": {"config": {"quantization_config": odd}}}) == ""
    assert quantization({"model": odd}) == ""
    assert adapter({"model": odd}) == ""
    assert adapter({"model": {"adapter": None}}) == ""


WEIGHTS: dict[str, dict[str, Any]] = {
    "; weights: bitsandbytes 4 bit.": {
        "config": {"quantization_config": NAMES["bitsandbytes 4 bit"]}
    },
    "; weights: mxfp4 dequantized to bfloat16.": {"dequantized_from": NAMES["mxfp4"], "config": {}},
    "; weights: fp8, LORA adapter of some/base.": {
        "config": {"quantization_config": NAMES["fp8"]},
        "adapter": {"kind": "LORA", "base": "some/base"},
    },
    "routers.": {"config": {}},
}


@pytest.mark.parametrize("said", WEIGHTS)
def test_the_data_line_says_so_in_every_output(said: str, cli_here: Cli, tmp_path: Path) -> None:
    uniform(path := tmp_path / "t")
    manifest, model = read_manifest(path), json.loads(json.dumps(WEIGHTS[said], default=str))
    capture = manifest["capture"] | {"dtype": "bfloat16"}
    edit_manifest(path, model=manifest["model"] | model, capture=capture)
    made = moe_inspect.report(path)
    (line,) = [f.text for f in made.verdict() if f.text.startswith("Judged on")]
    assert line.endswith(said)
    texts = [
        cli_here("report", path, "--html", tmp_path / "page.html").stdout,
        cli_here("report", path, "--table", "verdict", "--format", "csv").stdout,
        (tmp_path / "page.html").read_text(),
        made._repr_html_(),
    ]
    assert all(line in " ".join(text.split()) for text in texts)
    facts = dict(made.facts())
    assert ("quantization" in facts) == ("weights" in said)
    assert facts.get("adapter") == ("LORA adapter of some/base" if "adapter" in said else None)
