"""Coverage-guided fuzzing of every importer: `python -m tests.fuzz NAME --seconds N` (`make fuzz`
does all targets, which `--list` prints).

Whatever the bytes, an import ends in a trace that verifies, or in a MoeInspectError of one line.
What breaks that is written to tests/crashes/<NAME>-…, where tests/test_hostile.py finds it from
then on.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

CRASHES = Path(__file__).parent / "crashes"
BETWEEN = b"\n--- the next file ---\n"


def packed(folder: Path) -> tuple[list[Path], bytes]:
    """Names and contents of the files in a folder, in one piece."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return [p.relative_to(folder) for p in files], BETWEEN.join(p.read_bytes() for p in files)


def unpacked(names: list[Path], data: bytes, folder: Path) -> None:
    for name, content in zip(names, data.split(BETWEEN), strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def targets() -> dict[str, str]:
    """Name → format: what tests/foreign.py makes files of, and every format of the registry that it
    does not know, which is fuzzed from an empty file."""
    from moe_inspect.importers import MODULES
    from tests.foreign import FORMAT_OF

    return FORMAT_OF | {name: name for name in MODULES if name not in FORMAT_OF.values()}


def seed(name: str, folder: Path) -> tuple[list[Path], bytes, bool]:
    """The files that the maker of this name writes, and whether they need a config."""
    from tests.foreign import MAKERS

    folder.mkdir(parents=True)
    if name not in MAKERS:
        (folder / "input").touch()
        return *packed(folder), True
    made = MAKERS[name](folder)
    return *packed(folder), made.config


def check(name: str, names: list[Path], data: bytes, root: Path, model: Path | None) -> None:
    """Imports the files at `root`, an empty folder; what ends in neither of the two good ways is
    an exception."""
    from moe_inspect.errors import MoeInspectError
    from moe_inspect.importers.run import import_trace
    from moe_inspect.trace.verify import verify

    unpacked(names, data, root / "in")
    try:
        import_trace(
            targets()[name], [root / "in"], root / "t", model=model, warn=lambda line: None
        )
        said = None
    except MoeInspectError as error:
        said = str(error)
    if said is None:
        found = verify(root / "t")
        assert found.ok, f"imported, and not fine: {found.file} row {found.row}: {found.violation}"
        return
    assert said.strip(), "an error without words"
    assert "\n" not in said, f"an error of several lines: {said}"
    assert [p.name for p in root.iterdir()] == ["in"], "something is left of a failed import"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", nargs="?", choices=targets())
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--list", action="store_true", help="print the names of all targets")
    asked = parser.parse_args()
    if asked.list:
        print("\n".join(targets()))
        return
    if asked.name is None:
        parser.error("give the name of a target, or --list")
    import atheris

    with atheris.instrument_imports(include=["moe_inspect.importers", "moe_inspect.trace"]):
        from moe_inspect.importers.registry import formats

        formats()
    from tests.foreign import config_file

    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory))
    names, first, needs_config = seed(asked.name, scratch / "seed")
    model = config_file(scratch) if needs_config else None
    corpus = scratch / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(first)
    CRASHES.mkdir(exist_ok=True)

    def one_input(data: bytes) -> None:
        place = scratch / "place"
        shutil.rmtree(place, ignore_errors=True)
        (place / "in").mkdir(parents=True)
        check(asked.name, names, data, place, model)

    options = [
        f"-max_total_time={asked.seconds}",
        f"-artifact_prefix={CRASHES}/{asked.name}-",
        "-max_len=65536",
        "-timeout=30",
        "-rss_limit_mb=3000",
    ]
    atheris.Setup([sys.argv[0], *options, "-print_final_stats=1", str(corpus)], one_input)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
