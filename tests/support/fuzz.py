"""Coverage-guided fuzzing of every importer, of `import --map`, and of a GGUF model's header, which
`trace` and `describe` read: `python -m tests.support.fuzz NAME --seconds N` (`make fuzz`
does all targets, which `--list` prints).

Whatever the bytes, an import ends in a trace that verifies, or in a MoeInspectError of one line;
so does what only reads, but for the trace. What breaks that is written to tests/crashes/<NAME>-…,
where tests/test_hostile.py finds it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

CRASHES = Path(__file__).parent.parent / "crashes"
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
    """Name → format: what tests/support/foreign.py makes files of, and every format that it does
    not know, which is fuzzed from an empty file; then OTHERS, of no format of their own."""
    from moe_inspect.importers import MODULES
    from tests.support.foreign import FORMAT_OF

    unknown = {name: name for name in MODULES if name not in FORMAT_OF.values()}
    return FORMAT_OF | unknown | dict.fromkeys(OTHERS, "")


def _mapped_files(folder: Path) -> None:
    """Counts under names of another tool, and the map that says where they are."""
    value = {"layers": {"layer_1": {"0": {"n": 3, "of": "law"}, "1": {"n": 1, "of": "code"}}}}
    (folder / "c.json").write_text(json.dumps(value))
    (folder / "map").write_text("count=layers.layer_{layer}.{expert}.n,domain=of")


def _import_mapped(folder: Path, out: Path, model: Path | None) -> None:
    from moe_inspect.making import import_trace

    text = (folder / "map").read_text(errors="replace") if (folder / "map").exists() else ""
    import_trace("counts", [folder / "c.json"], out, model=model, map=text, warn=lambda line: None)


def _gguf_files(folder: Path) -> None:
    """The header of a model, with its experts and no weights."""
    from tests.support.foreign import gguf_file

    fields = {"general.architecture": "qwen3moe", "general.alignment": 32, "x.list": ["a", "b"]}
    parts = {f"blk.{n}.ffn_{part}_exps.weight" for n in (1, 2) for part in ("up", "down")}
    gguf_file(folder / "m.gguf", fields, dict.fromkeys(sorted(parts), (8, (32, 4, 8), b"")))


def _read_gguf(folder: Path, out: Path, model: Path | None) -> None:
    """All that reads the header of a model."""
    from moe_inspect.errors import MoeInspectError
    from moe_inspect.model.gguf import layer_experts, refuse_unless_described

    said: list[str] = []
    for read in (refuse_unless_described, layer_experts):
        try:
            read(folder / "m.gguf")
        except MoeInspectError as error:
            said.append(str(error))
    if said:
        raise MoeInspectError("; ".join(said))


# name → what writes its files into a folder, and what reads them
OTHERS: dict[str, tuple[Callable[[Path], None], Callable[[Path, Path, Path | None], None]]] = {
    "counts-map": (_mapped_files, _import_mapped),
    "gguf-model": (_gguf_files, _read_gguf),
}


def seed(name: str, folder: Path) -> tuple[list[Path], bytes, bool]:
    """The files that the maker of this name writes, and whether they need a config."""
    from tests.support.foreign import MAKERS

    folder.mkdir(parents=True)
    if name in OTHERS:
        OTHERS[name][0](folder)
        return *packed(folder), name == "counts-map"
    if name not in MAKERS:
        (folder / "input").touch()
        return *packed(folder), True
    made = MAKERS[name](folder)
    return *packed(folder), made.config


def check(name: str, names: list[Path], data: bytes, root: Path, model: Path | None) -> None:
    """Imports or reads the files at `root`, an empty folder; no good end is an exception."""
    from moe_inspect.errors import MoeInspectError
    from moe_inspect.making import import_trace
    from moe_inspect.trace.verify import verify

    folder, out = root / "in", root / "t"
    unpacked(names, data, folder)
    try:
        if name in OTHERS:
            OTHERS[name][1](folder, out, model)
        else:
            import_trace(targets()[name], [folder], out, model=model, warn=lambda line: None)
        said = None
    except MoeInspectError as error:
        said = str(error)
    if said is None:
        found = verify(out) if name != "gguf-model" else None
        assert found is None or found.ok, f"imported, and not fine: {found}"
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

    rooms = [f"moe_inspect.{room}" for room in ("importers", "model", "trace")]
    with atheris.instrument_imports(include=rooms):
        from moe_inspect.importers.context import formats

        formats()
        importlib.import_module("moe_inspect.model.gguf")
    from tests.support.foreign import config_file

    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory))
    names, first, needs_config = seed(asked.name, scratch / "seed")
    model = config_file(scratch) if needs_config else None
    (corpus := scratch / "corpus").mkdir()
    (corpus / "seed").write_bytes(first)
    CRASHES.mkdir(exist_ok=True)

    def one_input(data: bytes) -> None:
        place = scratch / "place"
        shutil.rmtree(place, ignore_errors=True)
        (place / "in").mkdir(parents=True)
        check(asked.name, names, data, place, model)

    options = [f"-max_total_time={asked.seconds}", f"-artifact_prefix={CRASHES}/{asked.name}-"]
    options += ["-max_len=65536", "-timeout=30", "-rss_limit_mb=3000", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one_input)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
