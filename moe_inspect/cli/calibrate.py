"""`moe-inspect calibrate`: has every expert enough calibration text, and which texts are enough."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import typer

from moe_inspect.cli.emit import text_to
from moe_inspect.cli.help import TABLES
from moe_inspect.cli.options import (
    GateOptions,
    Options,
    SelectionOptions,
    TraceArgument,
    exit_if_failed,
    in_panel,
    limit,
    not_stdout,
    option,
)
from moe_inspect.cli.progress import shown
from moe_inspect.cli.show import ShowOptions, table_option
from moe_inspect.text import no_such, plural, print_stderr

Tool = Literal["llm-compressor", "gptqmodel", "modelopt", "llama-imatrix"]
texts_option = in_panel("Texts")


def tokens_or_all(text: str | int) -> int | str:
    """ "20000" or "all"."""
    text = str(text)
    if text != "all" and not (text.isascii() and text.isdecimal() and int(text)):
        raise typer.BadParameter(f"{text!r} is not a number of tokens, or all")
    return text if text == "all" else int(text)


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions(Options):
    panel = "Options"

    min_tokens: int | None = option(
        "Tokens that every expert of every layer should get. Default: 4 per input of its first "
        "matrices (the hidden size), 512 where that is unknown.",
        min=1,
    )
    choose: Any = texts_option(
        "Choose documents: all is the fewest that give every expert the minimum, N the best with "
        "at most N tokens together.",
        "N|all",
        parser=tokens_or_all,
    )
    keep_mixture: float = texts_option(
        "Each domain keeps this part of its share of the tokens.",
        "PART",
        min=0,
        max=1,
        default=0.0,
    )


@dataclass(frozen=True, kw_only=True)
class TextsOptions(Options):
    """How the texts that are chosen are written."""

    panel = "Texts"

    tokens: bool = option("Write token ids in place of text, as the model was fed.", default=False)
    data: list[str] | None = option(
        "Where the corpus is now. Default: where it was when it was traced.",
        "[DOMAIN=]SRC",
    )
    tool: Tool | None = option(
        "Print how this tool calibrates with the texts of -o, in place of the summary.",
        flags=("--for",),
    )


@dataclass(frozen=True, kw_only=True)
class ShowTexts(ShowOptions):
    table: str | None = table_option(f"One table instead of the summary: {TABLES['calibrate']}.")
    output: Path | None = option(
        "With --choose, write the texts: .jsonl (document, domain, text) or .txt, for llama.cpp. "
        "With --table, write that table.",
        "FILE",
        flags=("-o", "--output"),
        callback=not_stdout,
    )


@dataclass(frozen=True, kw_only=True)
class CoverageGates(GateOptions):
    fail_above: list[str] | None = limit(
        "Exit with 3 if the metric of any layer is above: under_minimum=0."
    )
    fail_below: list[str] | None = limit(
        "Exit with 3 if the metric of any layer is below: coverage=0.99."
    )


def calibrate(
    *,
    trace: TraceArgument,
    options: CalibrationOptions,
    texts: TextsOptions,
    selection: SelectionOptions,
    show: ShowTexts,
    limits: CoverageGates,
) -> None:
    """Check that every expert gets enough calibration text.

    Reports which experts have fewer tokens than a quantiser or pruner needs, and how much of this
    text would be enough. With --choose also which documents are enough, beside random ones of the
    same size. Needs neither torch nor the model.

    Examples:
    moe-inspect calibrate runs/a
    moe-inspect calibrate runs/a --min-tokens 64 --fail-below coverage=0.99
    moe-inspect calibrate runs/a --choose all -o calib.jsonl
    moe-inspect calibrate runs/a --choose 20000 --keep-mixture 0.8 -o calib.txt
    moe-inspect calibrate runs/a --choose all -o calib.jsonl --for llm-compressor"""
    writes = show.output is not None and options.choose is not None and show.table is None
    for name, given in {"for": texts.tool, "tokens": texts.tokens, "data": texts.data}.items():
        if given and not writes:
            said = f"--{name} is about texts: give --choose N|all and -o FILE with it"
            raise typer.BadParameter(said)
    if texts.tokens and texts.tool:
        raise typer.BadParameter("--for reads texts: leave out --tokens")
    from moe_inspect.calibration.calibrate import CHOICES
    from moe_inspect.calibration.calibrate import TABLES as tables
    from moe_inspect.calibration.calibrate import calibrate as make
    from moe_inspect.calibration.texts import recipe
    from moe_inspect.reporting.verdict.gate import breaches
    from moe_inspect.trace.reader import open_trace

    opened, gates, output = open_trace(trace), limits.gates(tables), show.output
    said = recipe(opened, texts.tool, output) if texts.tool and output else ""
    if writes:
        show = replace(show, output=None)
    with shown():
        made = make(opened, **options.keywords(), **selection.keywords())
        if show.table is not None and show.table not in made.tables:
            if show.table in CHOICES:
                raise typer.BadParameter(f"--table {show.table} is of --choose: give it too")
            raise typer.BadParameter(no_such("table", show.table, made.tables))
        table, form = show.chosen(made.tables, "coverage")
        made.verdict()
        show.save(made)
        if writes and output is not None:
            n = made.write_texts(output, tokens=texts.tokens, data=texts.data or ())
            print_stderr(f"wrote {output}: {plural(n, 'document')}")
    if said:
        with text_to(None) as file:
            file.write(said)
        for line in made.said:
            print_stderr(line)
    else:
        show.write(made, table or ("coverage" if show.of_table else None), form)
    exit_if_failed([f"failed: {line}" for line in breaches(made, gates, tables)])
