"""`python -m benchmarks.published`: figures that others published, computed again by commands of
moe-inspect from public data. Writes benchmarks/results/published.md.

    python -m benchmarks.published [--data ../shared/real] [-o FILE] [--only TEXT …]

The data are the folders that benchmarks/public_data.md names, imported by its commands. A figure
whose folder is not there is skipped, with a line.

L layers, E experts, D domains or workloads, T tokens in a row, P slots, G GPUs.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import math
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.measuring import ROOT
from moe_inspect.analysis.metrics.balance import max_over_mean
from moe_inspect.cli import app


@dataclass(frozen=True)
class Figure:
    """published: values as they were printed; ours get as many digits. how: commands, of which the
    last gives the table; what the function makes of it is left. why: of a difference."""

    what: str
    source: str
    published: str
    how: str
    ours: Callable[[str], Sequence[float]]
    data: str = ""
    why: str = ""


# --- commands, in a folder where the data are


def run(command: str) -> None:
    """The traces that it reads are imported first, by the commands of benchmarks/public_data.md."""
    for name in re.findall(r"runs/(\w+)", command.partition(" -o ")[0]):
        imported(name)
    with redirect_stdout(io.StringIO()):
        code = app(shlex.split(command), standalone_mode=False)
    assert not code, command


def imported(name: str) -> Path:
    if not (trace := Path("runs", name)).exists():
        if name == "esft_law":
            exec(esft_as_table(), {})
        run(documented()[name])
    return trace


@cache
def documented() -> dict[str, str]:
    """Trace → the command of benchmarks/public_data.md that imports it."""
    found = re.findall(r"`moe-inspect (import [^`]* -o runs/(\w+)[^`]*)`", DATA.read_text())
    return {name: command for command, name in found}


def esft_as_table() -> str:
    """Lines of benchmarks/public_data.md that write esft_law.parquet of the texts in esft_law."""
    return DATA.read_text().partition("## Texts of ESFT")[2].split("```")[1].removeprefix("python")


@cache
def table(how: str) -> pd.DataFrame:
    """The table of the last command; the ones before record traces."""
    *before, last = how.split("; ")
    for command in before:
        run(command)
    run(f"{last} --format csv -o table.csv")
    return pd.read_csv("table.csv")


def column(how: str, name: str, **fields: str) -> np.ndarray:
    return table(how.format(**fields))[name].to_numpy()


def by_domain(
    how: str, names: str, column_of: str, of: Callable[[np.ndarray], Any] = np.mean
) -> list[float]:
    """Of each domain: one number of the values of its routers."""
    return [float(of(column(how, column_of, domain=name))) for name in names.split()]


def load_DLE(how: str) -> np.ndarray:
    """From a report's table `domains`: assignments [domains, layers, experts]."""
    made = table(how)
    shape = [made[name].nunique() for name in ("domain", "layer", "expert")]
    ordered = made.sort_values(["domain", "layer", "expert"])["assignments"]
    return ordered.to_numpy().reshape(shape)


def read(path: str) -> Any:
    data = Path(path).read_bytes()
    return json.loads(gzip.decompress(data) if path.endswith(".gz") else data)


# --- the figures


def ageing(how: str) -> list[float]:
    """Of the workloads that the plan is not fitted on."""
    return column(how, "max_over_mean")[1:].tolist()


def kept(how: str) -> list[float]:
    """Layers in which the experts that the command keeps are those of the published list."""
    for command in how.split("; "):
        run(command)
    ours, published = read("keep.json")["kept"], read("glm52/keep_mix108_maxmin.json")["keep"]
    return [sum(ours[layer] == sorted(keep) for layer, keep in published.items())]


def as_published(how: str) -> list[float]:
    """Scores that are the published ones, to the digits of these."""
    made: Any = esft_scores(how)
    published = read("esft_law/summary.json")
    return [
        sum(
            round(ours, 4) == published[f"{name}s"][str(layer)][str(expert)]
            for (layer, expert), ours in made[name].items()
        )
        for name in ("token_score", "gate_score")
    ]


def esft_scores(how: str) -> pd.DataFrame:
    """By layer and expert: its share of the assignments, and its mean gate weight over tokens."""
    made = table(how).set_index(["layer", "expert"])
    assignments = made["assignments"].groupby("layer").transform("sum")
    token, gate = made["assignments"] / assignments, made["gate_sum"] * 6 / assignments
    return pd.DataFrame({"token_score": token, "gate_score": gate})


def same_experts(how: str) -> list[float]:
    """Layers whose experts to train are the published ones: the fewest experts with the highest
    token scores that sum to 0.2."""
    published, same = read("esft_law/expert_config_law.json")["experts"], 0
    for layer, score in esft_scores(how)["token_score"].groupby("layer"):
        score = score.droplevel("layer").sort_values(ascending=False, kind="stable")
        chosen = score.index[score.cumsum() - score < 0.2 * (1 - 1e-9)]
        same += {*chosen} == {*published[str(layer)]}
    return [same]


def subjects(how: str) -> list[float]:
    """Of each subject the mean over layers of max ÷ mean: the least and the largest; the largest of
    any layer; the largest max ÷ min."""
    loads = load_DLE(how)
    worst_DL = np.array([max_over_mean(load_LE) for load_LE in loads])
    apart = max(float((load_LE.max(1) / load_LE.min(1)).max()) for load_LE in loads)
    return [*np.sort(worst_DL.mean(1))[[0, -1]].tolist(), float(worst_DL.max()), apart]


WORKLOADS = (
    "decode_in1000out1000 decode_in2000out100 prefill_in1000out1000 prefill_in2048 "
    "prefill_in4096 prefill_in512"
)
PLACED = "simulate placement runs/deepseek_loads --domains {domain} --gpus 32"
EPLB = f"{PLACED} --physical-experts 288 --policy eplb-global"
LOADS = "[SGLang-reproduce](https://github.com/GeneratedRandomly/SGLang-reproduce)"
THEIR_EPLB = f"DeepSeek's [EPLB](https://github.com/deepseek-ai/EPLB), run on the loads of {LOADS}"
COUNTED = "counted without moe-inspect from"
OLMOE = "[2409.02060](https://arxiv.org/abs/2409.02060)"
FIDDLER = "[fiddler](https://github.com/efeslab/fiddler/tree/popularity)"
ESFT = "[ESFT](https://github.com/deepseek-ai/ESFT/tree/main/results/expert_scores)"
BEYOND = "[MoE-Beyond](https://arxiv.org/abs/2508.17137)"
GLM = "[glm-expert-pruning](https://github.com/Dorijan10/glm-expert-pruning)"
OF_DOMAIN = "report runs/{} --domains {{domain}} --table balance"
OF_ACTIVATION = "report runs/{} --domains {{domain}} --table domains"
RECORDED = "trace demo -o runs/rollout --dtype bfloat16 --batch-tokens 256; "
RECORDED += "trace demo -o runs/trainer --dtype float32; "


FIGURES = (
    Figure(
        "DeepSeek-V3, six workloads: busiest ÷ mean of 32 GPUs, experts in order",
        f"{COUNTED} {LOADS}",
        "2.88, 2.63, 2.26, 2.64, 3.04, 2.08",
        f"{PLACED} --policy contiguous --table placement",
        partial(by_domain, names=WORKLOADS, column_of="max_over_mean"),
        "deepseek_loads",
    ),
    Figure(
        "DeepSeek-V3: the same as balancedness, mean over layers",
        f"{COUNTED} {LOADS}",
        "0.404, 0.434, 0.464, 0.417, 0.384, 0.501",
        f"{PLACED} --policy contiguous --table placement",
        partial(by_domain, names=WORKLOADS, column_of="balancedness"),
        "deepseek_loads",
    ),
    Figure(
        "DeepSeek-V3: EPLB's 288 slots on 32 GPUs, fitted and judged on the same workload",
        THEIR_EPLB,
        "1.007, 1.008, 1.007, 1.007, 1.006, 1.007",
        f"{EPLB} --table placement",
        partial(by_domain, names=WORKLOADS, column_of="max_over_mean"),
        "deepseek_loads",
    ),
    Figure(
        "DeepSeek-V3: how a plan ages, fitted on the first workload, judged on the five others",
        THEIR_EPLB,
        "1.26, 1.48, 1.46, 1.44, 1.51",
        f"{EPLB.format(domain=WORKLOADS.split()[0])} --table judged".replace("--d", "--fit-d"),
        ageing,
        "deepseek_loads",
    ),
    Figure(
        "GLM-5.2: of 75 layers, those where the published list of 108 experts is the most salient",
        GLM,
        "75",
        "import table glm52/blend_maxmin.json -o runs/glm_blend --experts 256 --top-k 8 --map "
        "count=layers.{layer}.cnt.{expert},saliency=layers.{layer}.sal.{expert}; "
        "export runs/glm_blend --format pruning --by saliency --keep 0.421875 -o keep.json",
        kept,
        "glm52",
    ),
    Figure(
        "OLMoE: busiest ÷ mean expert on arXiv's text and on C4, mean of layers 0, 7, 15",
        f"{COUNTED} the counts of {OLMOE}, figure 22",
        "7.2, 2.7",
        OF_DOMAIN.format("olmoe"),
        partial(by_domain, names="arxiv c4", column_of="max_over_mean"),
        "olmoe_paper",
    ),
    Figure(
        "Mixtral-8x7B: the same of its layers, on GitHub's text",
        f"{COUNTED} the counts of {OLMOE}, figure 22",
        "1.29",
        OF_DOMAIN.format("mixtral"),
        partial(by_domain, names="github", column_of="max_over_mean"),
        "olmoe_paper",
    ),
    Figure(
        "OLMoE: largest share of a domain's tokens that choose one expert: arXiv, C4, GitHub (%)",
        f"{COUNTED} the counts of {OLMOE}, figure 22",
        "97.7, 37.7, 77.0",
        OF_ACTIVATION.format("olmoe"),
        lambda how: [100 * x for x in by_domain(how, "arxiv c4 github", "activation", np.max)],
        "olmoe_paper",
    ),
    Figure(
        "DeepSeek-V2-Lite on law: of 1,664 token scores and gate scores, those equal to 4 digits",
        ESFT,
        "1664, 1664",
        "report runs/esft_law --table worth",
        as_published,
        "esft_law",
    ),
    Figure(
        "DeepSeek-V2-Lite: of 26 layers, those with the published experts to train",
        ESFT,
        "26",
        "report runs/esft_law --table worth",
        same_experts,
        "esft_law",
    ),
    Figure(
        "Mixtral-8x7B on seven subjects of MMLU: busiest ÷ mean expert of the most and the least "
        "even subject, of the worst layer; largest ÷ smallest load",
        f"{COUNTED} {FIDDLER}",
        "1.22, 1.45, 1.99, 46.5",
        "report runs/mixtral_mmlu --table domains",
        subjects,
        "fiddler_mixtral",
    ),
    Figure(
        "Mixtral-8x7B on MMLU: information between subject and expert, bits",
        f"{COUNTED} {FIDDLER}",
        "0.013",
        "report runs/mixtral_mmlu --table specialization",
        lambda how: [float(column(how, "domain_mi_bits").mean())],
        "fiddler_mixtral",
    ),
    Figure(
        "DeepSeek-V2-Lite: distinct experts of 2, 4, 8, 16 tokens in a row ÷ k",
        f"{COUNTED} prompts of {BEYOND}",
        "1.73, 2.91, 4.65, 6.74",
        "simulate decode runs/deepseek_v2_lite --batch 1 --draft 1,3,7,15 --table speculation",
        lambda how: column(how, "relative_cost")[3::3].tolist(),  # of each acceptance the same
        "deepseek_v2_lite_tokens",
        "that count does not say of which prompts and rows it is",
    ),
    Figure(
        "DeepSeek-V2-Lite: hit rate of LRU with 6 of 64 experts of a layer",
        f"{COUNTED} prompts of {BEYOND}",
        "0.26",
        "simulate cache runs/deepseek_v2_lite --slots 6 --policy lru --table cache",
        lambda how: [float(column(how, "hit_rate").mean())],
        "deepseek_v2_lite_tokens",
        "other prompts, as above: k slots hold the experts of the last token, and so the rate is 2 "
        "− the first figure there",
    ),
    Figure(
        "DeepSeek-V2-Lite: hit rate where 10 % of the experts fit",
        f"{BEYOND}, for MoE-Infinity",
        "0.17",
        "simulate cache runs/deepseek_v2_lite --slots 6 --policy lru --table cache",
        lambda how: [float(column(how, "hit_rate").mean())],
        "deepseek_v2_lite_tokens",
        "theirs is one cache for all layers, filled by MoE-Infinity's prediction, on other text; "
        "ours is an LRU cache for each layer",
    ),
    Figure(
        "rollout and trainer: decisions, and tokens in any layer, with other experts (%)",
        "R3, [2510.11370](https://arxiv.org/abs/2510.11370), of Qwen3-30B-A3B, SGLang, Megatron",
        "10, 94",
        RECORDED + "compare runs/rollout runs/trainer --table overall",
        lambda how: [
            100 * float(column(how, name)[0]) for name in ("decisions_mismatch", "tokens_mismatch")
        ],
        why="the same kind at another size: 4 layers of 2 of 8 experts here, 48 of 8 of 128 there; "
        "and only data types and batches differ here, not the engines' kernels",
    ),
)


# --- the page


def written(value: float, published: str) -> str:
    """With the digits of the published value, and at least two that count."""
    digits = max(len(published.partition(".")[2]), 1 - math.floor(math.log10(value)))
    return f"{value:.{digits}f}"


def row(figure: Figure) -> str:
    published = figure.published.split(", ")
    values = figure.ours(figure.how)
    assert len(values) == len(published), figure.what
    ours = [written(*pair) for pair in zip(values, published, strict=True)]
    same = ours == published
    if not same and not figure.why:
        sys.exit(f"{figure.what}: {', '.join(ours)}, not {figure.published}: say why")
    by = getattr(figure.ours, "func", figure.ours).__name__
    commands = figure.how.replace("{domain}", "NAME").split("; ")
    how = "<br>".join(f"`{one}`" for one in commands if one) or f"`{by}` of published.py"
    cells = (figure.what, figure.source, figure.published, ", ".join(ours))
    return f"| {' | '.join(cells)} | {'the same' if same else figure.why} | {how} |"


def page(figures: Sequence[Figure], data: Path) -> str:
    rows, skipped = list[str](), list[str]()
    for figure in figures:
        if figure.data and not (data / figure.data).is_dir():
            skipped.append(f"Skipped, as there is no {figure.data}: {figure.what}.")
            print(skipped[-1])
            continue
        rows.append(row(figure))
        print(rows[-1])
    return "\n".join([HEAD, *rows, "", *(f"{line}  " for line in skipped)]).rstrip() + "\n"


DATA = ROOT / "benchmarks/public_data.md"
PAGE = ROOT / "benchmarks/results/published.md"
HEAD = """# Published figures, reproduced

Written by `python -m benchmarks.published` from the
[public data](../public_data.md), whose commands import them. If the authors
published counts and no figure, the third column was counted from theirs, once, by a few lines
without moe-inspect. A command with `NAME` runs for each workload or domain. Figures that no command
prints are computed from its table by a function of
[benchmarks/published.py](https://github.com/moe-inspect/moe-inspect/blob/main/benchmarks/published.py).

| figure | source | published | ours | difference | how |
|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Published figures, computed again.")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/real")
    parser.add_argument(
        "-o", "--output", type=Path, default=ROOT / "benchmarks/results/published.md"
    )
    parser.add_argument("--only", nargs="*", default=[""], help="figures whose name has this text")
    given = parser.parse_args()
    data, output = given.data.resolve(), given.output.resolve()
    figures = [f for f in FIGURES if any(text in f.what for text in given.only)]
    with tempfile.TemporaryDirectory() as place:
        for folder in data.iterdir() if data.is_dir() else ():
            Path(place, folder.name).symlink_to(folder)
        os.chdir(place)
        text = page(figures, data)
        os.chdir(ROOT)
    output.write_text(text)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
