"""FORMATS: what `import` reads. The command line and the README's table read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.context import Imported, Job, Source

Sniffer = Callable[[str, bytes], bool]
HEAD_BYTES = 65_536


@dataclass(frozen=True)
class Format:
    """`sniff`: whether a file of this name that begins with these bytes (a .parquet: and ends with
    the last of them) is of the format."""

    name: str
    reads: str
    gives: str
    run: Callable[[Job], Imported]
    sniff: Sniffer


FORMATS: dict[str, Format] = {}


def importer(
    name: str, reads: str, gives: str, sniff: Sniffer
) -> Callable[[Callable[[Job], Imported]], Callable[[Job], Imported]]:
    def register(run: Callable[[Job], Imported]) -> Callable[[Job], Imported]:
        FORMATS[name] = Format(name, reads, gives, run, sniff)
        return run

    return register


def sniff(sources: list[Source]) -> str:
    """The format of the first source, by its first file that any format knows."""
    path = sources[0].path
    files = sorted(p for p in path.rglob("*") if p.is_file())[:1000] if path.is_dir() else [path]
    for file in files:
        with open(file, "rb") as opened:
            head = opened.read(HEAD_BYTES)
            if head[:4] == b"PAR1":  # its columns are named at its end
                opened.seek(max(file.stat().st_size - HEAD_BYTES, 0))
                head += opened.read(HEAD_BYTES)
        for name, format in FORMATS.items():
            if format.sniff(file.name, head):
                return name
    raise MoeInspectError(
        f"{path} is of no format that is known by its looks: name one of {', '.join(FORMATS)}"
    )


def named(path: Path) -> str:
    """The domain of a file without a label: its name."""
    return path.name.split(".")[0] or path.name
