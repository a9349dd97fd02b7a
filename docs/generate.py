"""What the site takes from the program: its commands, tables, metrics and importers, as
Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

SAMPLE = Path(__file__).parent.parent / "sample_traces/balanced"


def commands() -> str:
    """A section per command: its usage, its help and its options, from the command line itself."""
    import typer

    from moe_inspect.cli import app

    return "\n".join(_command(typer.main.get_command(app), "moe-inspect"))


def _command(command: Any, name: str) -> Iterator[str]:
    subcommands = getattr(command, "commands", {})
    if not subcommands:
        context = command.context_class(command, info_name=name)
        usage = " ".join(command.collect_usage_pieces(context))
        yield from (f"### {name}", "", f"```text\n{name} {usage}\n```", "")
        yield from (_text(command.help or ""), "")
        yield "| | |\n|---|---|"
        for parameter in command.params:
            names, text = parameter.get_help_record(context)
            names = names.strip().replace("|", "\\|")  # a cell ends at a bar, even in code
            yield f"| `{names}` | {_text(text)} |"
        yield from ("", f"```text\n{command.epilog}\n```", "")
    for subcommand in subcommands:
        yield from _command(subcommands[subcommand], f"{name} {subcommand}")


def _text(text: str) -> str:
    """Plain text as Markdown: paragraphs stay, and nothing in it is markup."""
    paragraphs = [" ".join(part.split()) for part in text.replace("\\[", "[").split("\n\n")]
    return re.sub(r"([|*<\[\]\\])", r"\\\1", "\n\n".join(paragraphs))


def metrics() -> str:
    """A section per table, with a row per metric of the registry."""
    from moe_inspect.analysis.metrics.registry import listing

    rows = listing()
    sections = []
    for table in dict.fromkeys(row["table"] for row in rows):
        sections += [f"### {table}", "", "| metric | definition | range; if even |"]
        sections += ["|---|---|---|"]
        for row in rows:
            if row["table"] == table:
                source = f" ({_link(row['source'])})" if row["source"] else ""
                sections.append(
                    f"| `{row['metric']}` | {_text(row['definition'])}{source} | "
                    f"{_text(row['range'])}; {_text(row['even'])} |"
                )
        sections.append("")
    return "\n".join(sections)


def _link(source: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", source)


def importers() -> str:
    """A row per format that `import` reads."""
    from moe_inspect.importers.context import formats

    head = "| format | reads | gives |\n|---|---|---|"
    return "\n".join(
        [head, *(f"| `{f.name}` | {f.reads} | {f.gives} |" for f in formats().values())]
    )


def engine_variables() -> str:
    """A row per variable of the plugin of serving engines."""
    from moe_inspect.capture.engine.settings import Settings, variable

    rows = [
        f"| `{variable(one.name)}` | {one.metadata['shown']} | {one.metadata['meaning']} |"
        for one in fields(Settings)
    ]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows])


def import_columns() -> str:
    """A row per column of ours that a table may have."""
    from moe_inspect.importers.tables.presets import COLUMNS

    rows = [f"| `{name}` | {meaning} |" for name, meaning in COLUMNS.items()]
    return "\n".join(["| column | is |\n|---|---|", *rows])


def manifest_keys() -> str:
    """A row per key of trace.json."""
    return _schema_table("trace_json")


def shard_line_keys() -> str:
    """A row per key of a line of shards-<rank>.jsonl."""
    return _schema_table("shard_line")


def _schema_table(name: str) -> str:
    from moe_inspect.trace.schema import read_schema

    schema = read_schema(name)
    head = "| key | value | required | meaning |\n|---|---|---|---|"
    return "\n".join([head, *_schema_rows(schema, schema)])


def _schema_rows(owner: Any, schema: Any, prefix: str = "") -> Iterator[str]:
    """Rows of the keys of `owner`, a part of `schema`."""
    for name, key in owner["properties"].items():
        required = "yes" if name in owner.get("required", []) else ""
        yield f"| `{prefix}{name}` | {_allowed(key)} | {required} | {_text(key['description'])} |"
        if "properties" in key:
            yield from _schema_rows(key, schema, f"{prefix}{name}.")
        if "items" in key:
            item = schema["$defs"][key["items"]["$ref"].rpartition("/")[2]]
            yield from _schema_rows(item, schema, f"{prefix}{name}[].")


def _allowed(key: Any) -> str:
    """Values that a key of a JSON Schema allows."""
    values = [key["const"]] if "const" in key else key.get("enum", [])
    if values:
        return " or ".join(f"`{json.dumps(value)}`" for value in values)
    types = [key["type"]] if isinstance(key["type"], str) else key["type"]
    text = " or ".join(types)
    if "64" in key.get("pattern", ""):
        text += ", 64 hexadecimal digits"
    if "minimum" in key:
        bounds = [_integer(key[bound]) for bound in ("minimum", "maximum") if bound in key]
        text += f", {' to '.join(bounds)}"
    return text


def _integer(value: int) -> str:
    """`value`, as a power of two if it is a large one or the number before."""
    exponent = (value + 1).bit_length() - 1
    if value < 2**20 or value not in (2**exponent, 2**exponent - 1):
        return str(value).replace("-", "−")
    return f"2^{exponent}" if value == 2**exponent else f"2^{exponent} − 1"


def check_kinds() -> str:
    """A row per kind of finding of `check`."""
    from moe_inspect.checking.kinds import KINDS

    rows = [
        f"| `{name}` | {kind.sign} | {_text(kind.means)} | {_text(kind.mend)} "
        f"| {_text(', '.join(kind.bugs))} |"
        for name, kind in KINDS.items()
    ]
    return "\n".join(
        ["| kind | sign | meaning | what to do | looks like |\n|---|---|---|---|---|", *rows]
    )


def columns() -> str:
    """A row per table of a report, with its columns, from the report on a sample trace."""
    from moe_inspect.public import report

    tables = report(SAMPLE).tables
    rows = [
        f"| `{name}` | {', '.join(f'`{column}`' for column in tables[name].columns)} |"
        for name in tables
    ]
    return "\n".join(["| table | columns |\n|---|---|", *rows])


def latency_errors_by() -> str:
    """Of all these kernels, a row per number of ranks, and per tokens of a step."""
    table, kinds = _errors(), ("held-out shapes", "another GPU", "another engine", *BASELINES)
    together = table[table["gpu"] == "all"]
    lines = [f"| | pairs | {' | '.join(kinds)} |", f"|{'---|' * (2 + len(kinds))}"]
    of_all = (together["ep"] == "all") & (together["tokens"] == "all")
    by_ranks = together[(together["ep"] != "all") & ~of_all]
    by_tokens = together[(together["tokens"] != "all") & ~of_all]
    for part, column, what in (
        (together[of_all], "ep", "{}"),
        (by_ranks.sort_values("ep", key=lambda ep: ep.astype(int)), "ep", "EP{}"),
        (by_tokens, "tokens", "up to {} tokens"),
    ):
        for key, mine in part.groupby(column, sort=False):
            of = {row["by"]: row for row in mine.to_dict("records")}
            cells = [_error(of[by]) if by in of else "" for by in kinds]
            name = what.format(key).replace("up to more", "more")
            lines.append(f"| {name} | {of[kinds[0]]['pairs']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


BASELINES = ("load ratio", "no effect", "roofline, not fitted")


def _errors() -> Any:
    import pandas as pd

    return pd.read_csv(Path(__file__).parent.parent / "benchmarks/results/latency-errors.csv")


def _error(row: Any) -> str:
    return f"{row['imbalance_error_median']:.3f} / {row['imbalance_error_p90']:.3f}"


def engine_cost() -> str:
    """A row per way to record inside vLLM that `benchmarks.engine` has measured."""
    folder = Path(__file__).parent.parent / "benchmarks/results"
    path = folder / "engine-intel-xeon-processor-2-cores.json"
    head = ("", "steps ÷ no plugin", "95 % interval", "typical step", "thread", "cost")
    head += ("in a step", "behind it")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    ways = json.loads(path.read_text(encoding="utf-8"))["measured"]["ways"]
    for way, of in [*ways.items()][1:]:
        low, high = of["interval"]
        cells = [way, f"{of['ratio']:.3f}", f"{low:.3f} to {high:.3f}", f"{of['typical']:.3f}"]
        cells += [f"{of[name]:.3f}" if name in of else "" for name in ("thread_share", "cost")]
        for name in ("us_in_a_step", "us_behind_a_step"):
            cells.append(f"{of[name]:.0f} µs" if name in of else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


GENERATED: dict[str, Callable[[], str]] = {
    "commands": commands,
    "metrics": metrics,
    "importers": importers,
    "engine_variables": engine_variables,
    "import_columns": import_columns,
    "manifest_keys": manifest_keys,
    "shard_line_keys": shard_line_keys,
    "check_kinds": check_kinds,
    "columns": columns,
    "latency_errors_by": latency_errors_by,
    "engine_cost": engine_cost,
}


def fill(text: str, only_written: bool = False) -> str:
    """Fill in the generated parts of a page.

    Each starts with `<!-- generated: NAME -->`. With an `<!-- end -->` it is written into the page,
    which then can be read without the site. With `only_written`, fill in no others."""

    def generated(match: re.Match[str]) -> str:
        marker, name, written = match.groups()
        if only_written and not written:
            return match[0]
        text = GENERATED[name]()
        return f"{marker}\n\n{text}\n\n<!-- end -->" if written else text

    marker = r"(<!-- generated: (\w+) -->)"
    return re.sub(rf"{marker}(\n\n(?:(?!<!-- ).)*<!-- end -->)?", generated, text, flags=re.DOTALL)


def docstring_as_rst(lines: list[str]) -> list[str]:
    """A docstring, which is plain text with `names` in backticks, as reStructuredText: code and
    lists of parameters stay as they stand."""
    out: list[str] = []
    for paragraph in "\n".join(lines).strip("\n").split("\n\n"):
        rows = paragraph.split("\n")
        if any(re.match(r" |\w+(, \w+)* {2,}\S", row) for row in rows):
            out += ["::", "", *(f"    {row}" for row in rows), ""]
        else:
            parts = re.split(r"(`+[^`]+`+)", " ".join(row.strip() for row in rows))
            out += [
                "".join(
                    f"``{part.strip('`')}``" if part.startswith("`") else _escaped(part)
                    for part in parts
                ),
                "",
            ]
    return out


def _escaped(text: str) -> str:
    return re.sub(r"([*|_\\])", r"\\\1", text)


if __name__ == "__main__":  # updates the generated text that is written into pages
    for page in Path(__file__).parent.glob("*.md"):
        if "<!-- end -->" in (text := page.read_text(encoding="utf-8")):
            page.write_text(fill(text, only_written=True), encoding="utf-8")
