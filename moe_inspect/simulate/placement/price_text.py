"""What the verdict and the chart of `simulate placement` say of measured times."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from moe_inspect.analysis.metrics.chance import ALPHA
from moe_inspect.reporting.charts import spec
from moe_inspect.simulate.placement.tables import worth
from moe_inspect.simulate.result import Frame, Settings, Tables
from moe_inspect.text import plural


def priced(tables: Tables, rows: dict[str, Any], settings: Settings, unseen: bool) -> list[str]:
    """`rows`: of the table `policies`; `unseen`: whether plans are judged on other text than they
    are fitted on."""
    said = _eplb(rows, settings, unseen)
    if "rebalancing" in tables:
        said += _rebalanced(tables, rows, settings)
    if "traffic" in tables and settings["nodes"] > 1:
        row, even = rows[settings["recommended"]], 1 - 1 / settings["nodes"]
        said.append(
            f"Under {row['policy']} {row['inter_node']:.0%} of the tokens that GPUs send go to "
            f"another node ({even:.0%} if they went anywhere alike), {row['intra_node']:.0%} to "
            "another GPU of the node."
        )
    if "sweep" in tables:
        said.append(_knee(tables["sweep"], settings))
    return [
        *said,
        *(
            f"No step of {settings['batch_tokens']:,} tokens in {what}, which is not in the times."
            for what in settings["unpriced"]
        ),
    ]


def _eplb(rows: dict[str, Any], settings: Settings, unseen: bool) -> list[str]:
    """Whether the faster EPLB is worth it, beside experts in order."""
    eplbs, first = [rows[name] for name in rows if name.startswith("eplb")], rows.get("contiguous")
    if not eplbs or not first:
        return []
    best, error = min(eplbs, key=lambda row: row["ms"]), settings["error"]
    costs, of_first = (max(row["ms"] - row["even_ms"], 0.0) for row in (best, first))
    less = f"{costs / of_first - 1:+.0%}; of the step " if of_first > 0 else "of the step "
    doubt = f"model error {error:.0%}" if error is not None else "model error unknown"
    change = best["ms"] / first["ms"] - 1
    line = (
        f"EPLB here: imbalance costs {costs:.2g} ms, on top of {best['even_ms']:.3g}, instead of "
        f"{of_first:.2g} in order ({less}{change:+.0%}, {doubt})"
    ).replace("-", "−")
    doubt = _doubt(best, first, settings)
    why = doubt or ("worth it" if unseen else "worth it on the text that it is fitted on")
    return [f"{line}: {why}."]


def _doubt(row: Any, first: Any, settings: Settings) -> str:
    """Why a policy is not said to be worth it, beside experts in order."""
    error, change = settings["error"], float(np.log(row["ms"] / first["ms"]))
    if settings["too_few"] or (np.isnan(p := row["in_order_p"]) and not settings["counts_only"]):
        return "too little text to tell whether it is worth it"
    if p >= ALPHA:
        return "no more than chance: not worth it"
    if error is None:
        return "what it is worth is unknown"
    if abs(change) <= worth(error):
        return "within the error: not worth it"
    return "slower: not worth it" if change > 0 else ""


def _rebalanced(tables: Tables, rows: dict[str, Any], settings: Settings) -> list[str]:
    """What a change of the plan costs, and how often it pays."""
    table, ageing, N = tables["rebalancing"], settings["ageing"], settings["batch_tokens"]
    start, again = table.iloc[0], table.iloc[1:].drop(columns="window").mean(numeric_only=True)
    mine, first, error = rows[start["policy"]], rows.get("contiguous"), settings["error"]
    said = f"To rebalance from experts in order to {start['policy']}, {_sent(start)}"
    said += " at the bandwidth within a node" if start["move_ms"] > 0 else ""
    if first and start["move_ms"] > 0 and not _doubt(mine, first, settings):
        steps = start["move_ms"] / (first["ms"] - mine["ms"])
        said += f", paid back after {plural(math.ceil(steps), 'step')}"
    if unknown := ageing.unknown or ("too little text" if settings["too_few"] else ""):
        often = f"How often it pays to do so again is unknown: {unknown}."
    elif ageing.p >= ALPHA:
        often = "Loads do not drift beyond chance: to rebalance again does not pay."
    elif error is None or np.log1p(ageing.most / mine["ms"]) <= error:
        often = (
            f"As it ages, a plan loses up to {ageing.most:.2g} ms of a step, which is within the "
            "error of the times: to rebalance again is not known to pay."
        )
    elif not again["move_ms"] > 0:
        often = "How often it pays to do so again is unknown: the time of a move is."
    else:
        steps, windows = settings["window"] / N, len(table)  # steps of a window
        best = math.sqrt(2 * again["move_ms"] * steps / ageing.lost)
        beyond = f" (the trace has {_round(steps * windows)})" if best > steps * windows else ""
        often = (
            f"From window to window {_sent(again)}, and a plan loses up to {ageing.most:.2g} ms of "
            f"a step as it ages: to rebalance pays every {_round(best)} steps{beyond}; never "
            f"within {_round(again['move_ms'] / ageing.most)}."
        )
    return [f"{said}.", often]


def _sent(row: Any) -> str:
    said = (
        f"{row['moved_gb']:.3g} GB move, {row['moved_gb_of_gpu']:.3g} to the GPU that is sent most"
    )
    return said if np.isnan(row["move_ms"]) else f"{said}, in {row['move_ms']:.3g} ms"


def _round(steps: float) -> str:
    """Two digits, at least 1."""
    return f"{max(1.0, float(f'{steps:.2g}')):,.0f}"


def _knee(sweep: Frame, settings: Settings) -> str:
    """The number of slots from which more are not worth it."""
    fits, least = sweep[sweep["fits"]], worth(settings["error"])
    if fits.empty:
        return (
            f"No number of slots fits in {settings['memory_gb']:g} GB of a GPU: the experts of "
            f"{sweep['physical_experts'].min()} take {sweep['memory_gb'].min():.3g} GB."
        )
    if settings["too_few"] or (fits["ms_p"].isna().any() and not settings["counts_only"]):
        return "How many slots are worth it is unknown: too little text."
    enough = fits[(1 - fits["ms"].min() / fits["ms"] < least) | (fits["ms_p"] >= ALPHA)]
    first, knee, most = fits.iloc[0], enough.iloc[0], fits.iloc[-1]
    fastest = fits["ms"].min()
    said = f"{knee['physical_experts']} slots per layer are the knee: {_size(knee)}"
    if knee["physical_experts"] > first["physical_experts"]:
        said += f", instead of {_size(first)} with {first['physical_experts']}"
    if knee["physical_experts"] == most["physical_experts"]:
        return (
            f"{said}. They are the most that {'fit' if len(fits) < len(sweep) else 'were tried'}."
        )
    beyond = " or beyond chance" if fits["ms_p"].notna().any() else ""
    return (
        f"{said}. More, up to {most['physical_experts']}, take no less time by {least:.0%}"
        f"{beyond} (at best {fastest:.3g} ms)."
    )


def _size(row: Any) -> str:
    return f"{row['ms']:.3g} ms and {row['memory_gb']:.3g} GB of a GPU"


def by_pair(traffic: Frame) -> spec.Panel:
    """Tokens of a step from GPU to GPU."""
    wide = traffic.pivot(index="gpu_from", columns="gpu_to", values="tokens_per_step")
    sent_GG = wide.to_numpy(float)
    scale = spec.amount("tokens of a step", 0, sent_GG, 1)
    gpus = tuple(map(str, wide.columns))
    title = f"What GPUs send under {traffic['policy'].iloc[0]}, over all layers"
    heatmap = spec.Heatmap(sent_GG, scale)
    return spec.Panel((heatmap,), spec.Axis("to GPU", gpus), spec.Axis("from GPU", gpus), title)


def by_memory(sweep: Frame) -> spec.Panel:
    x = np.arange(len(sweep), dtype=float)
    marks = (
        spec.Line(x, sweep["even_ms"].to_numpy(float), "even load", "baseline", "dash"),
        spec.Line(x, sweep["ms"].to_numpy(float), str(sweep["policy"].iloc[0]), "c1", "", True),
    )
    of = sweep[["physical_experts", "memory_gb"]].itertuples(index=False)
    memory = spec.Axis("slots per layer", tuple(f"{slots} ({gb:.3g} GB)" for slots, gb in of))
    return spec.Panel(
        marks,
        memory,
        spec.Axis("ms of a step", low=0),
        "Time against the memory of a GPU that experts take",
    )
