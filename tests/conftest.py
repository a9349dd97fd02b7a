"""One thread for torch: spinning threads cost ten times what they bring on two cores. No hub,
ever."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_inspect.public import Trace
    from moe_inspect.reporting.report import Report
    from tests.support.browser import Opened

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# kernels called by name run on the CPU; everything else uses the torch references
os.environ["TRITON_INTERPRET"] = "1"

import pytest

# a shell ignores Ctrl-C in what it starts in the background, and so would all that a test starts
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
Put = Callable[..., None]
OpenPage = Callable[..., "Opened"]


# `make test` runs one file per core at a time (--dist loadfile): those with six seconds of CPU
# time or more first, the longest of all at the start, so that no core is idle at the end
LONG = (
    "audit_loss engine_writer cli_trace readme experts oracles_simulate oracles_report options "
    "zoo record placement watch training_trainer real_data kernels simulate_step one_line "
    "oracles_compare engine_plugin compare_findings check mxfp4 ranks alarms page_sizes docs kinds "
    "first_launch page commit_every contributing hostile adapters decode_steps"
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first, then by number of tests, where several processes share the files."""
    if not hasattr(config, "workerinput"):
        return
    tests, long = Counter(item.path.stem for item in items), LONG.split()

    def turn(item: pytest.Item) -> tuple[int, int, str]:
        file = item.path.stem
        name = file.removeprefix("test_")
        return long.index(name) if name in long else 99, -tests[file], file

    items.sort(key=turn)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what tests found, whichever process they ran in."""
    for report in terminalreporter.stats.get("passed", []):
        for name, text in report.user_properties:
            if name == "print":
                terminalreporter.write_line("\n" + text)


def write_table(
    reporter: pytest.TerminalReporter,
    name: str,
    variable: str,
    table_of: Callable[[list[str]], str],
    place: str = "",
) -> None:
    """The table of the rows that tests recorded as property `name`: printed, and put into the page
    that the environment variable names, between its marks of `place`, if everything ran."""
    passed = reporter.stats.get("passed", [])
    rows = [str(row) for report in passed for key, row in report.user_properties if key == name]
    if not rows:
        return
    table = table_of(rows)
    reporter.write_line("\n" + table)
    left_out = [k for k in ("failed", "error", "skipped") if reporter.stats.get(k)]
    if (path := os.environ.get(variable)) and not left_out:
        write_between_marks(Path(path), f"table{place}", table)


def write_between_marks(path: Path, name: str, text: str) -> None:
    """Replace the text between `<!-- NAME -->` and `<!-- end of NAME -->` in a page."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = path.read_text().partition(begin)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Runs `moe-inspect …` as a user does, in an empty directory."""

    def run(
        *arguments: object, check: int | None = 0, **options: object
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "moe_inspect", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            **options,
        )
        if check is not None:
            assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@contextmanager
def signals_kept() -> Iterator[None]:
    """A command that runs in this process leaves handlers of its own, as its process would end."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    with signals_kept():
        yield


def run_here(*arguments: object, check: int | None = 0) -> subprocess.CompletedProcess[str]:
    """`moe-inspect …` in this process, which has imported everything: it saves a second or five."""
    from moe_inspect.__main__ import main

    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in "12")
    code, before, line = 0, sys.argv, ["moe-inspect", *map(str, arguments)]
    sys.argv = line
    try:
        with signals_kept(), redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as done:
        code = int(done.code or 0)
    finally:
        sys.argv = before
    said, complained = (stream.buffer.getvalue().decode() for stream in (out, err))
    if check is not None:
        assert code == check, f"exit {code}\n{said}\n{complained}"
    return subprocess.CompletedProcess(line, code, said, complained)


@pytest.fixture
def cli_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """As `cli`, in this process."""

    def run(*arguments: object, check: int | None = 0) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        return run_here(*arguments, check=check)

    return run


@pytest.fixture(scope="session")
def planted_trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    from tests.support.planted import planted

    return planted(tmp_path_factory.mktemp("planted") / "t")


@pytest.fixture(scope="session")
def planted_report(planted_trace: Trace) -> Report:
    from moe_inspect.public import report

    return report(planted_trace)


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.synthetic import thirty_documents

    root = tmp_path_factory.mktemp("sound") / "t"
    thirty_documents(root)
    return root


@pytest.fixture
def copied(sound: Path, tmp_path: Path) -> Path:
    """A trace of thirty documents, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "t"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, headless."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if not found and not os.environ.get("REQUIRE_CHROMIUM"):
        pytest.skip("no chromium here: apt-get install chromium, or set CHROMIUM to its path")
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as tool:
        started = tool.chromium.launch(executable_path=found, args=arguments)
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[OpenPage]:
    """open_page(text): a page in the browser, while a test runs."""
    from tests.support.browser import Opened

    with ExitStack() as opened:

        def page(text: str, **more: Any) -> Opened:
            return opened.enter_context(Opened(browser, tmp_path / "page.html", text, **more))

        yield page


@contextmanager
def phases_begun() -> Iterator[list[str]]:
    """The names of the phases that begin in the block."""
    from moe_inspect import progress

    begun = list[str]()

    def listener(name: str, total: int, unit: str) -> progress.Advance:
        begun.append(name)
        return lambda done: None

    with progress.listening(listener):
        yield begun


IN_ONE_PROCESS = """
import json, os, sys
from moe_inspect.__main__ import main

for n, arguments in enumerate(json.loads(sys.argv[1])):
    for descriptor, name in ((1, f"{n}.out"), (2, f"{n}.err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = ["moe-inspect", *arguments]
    try:
        main()
    except SystemExit as done:
        open(f"{n}.code", "w").write(str(done.code or 0))
"""


def in_one_process(
    directory: Path, *commands: Sequence[object], **environment: str
) -> list[subprocess.CompletedProcess[str]]:
    """Runs `moe-inspect …` for each command in one process; all that libraries write is caught."""
    texts = [list(map(str, command)) for command in commands]
    subprocess.run(
        [sys.executable, "-c", IN_ONE_PROCESS, json.dumps(texts)],
        cwd=directory,
        env={**os.environ, **environment},
        check=True,
    )
    return [
        subprocess.CompletedProcess(
            arguments,
            int((directory / f"{n}.code").read_text()),
            (directory / f"{n}.out").read_text(),
            (directory / f"{n}.err").read_text(),
        )
        for n, arguments in enumerate(texts)
    ]


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Put:
    """put(owner, name=value, …): the attributes of an object, while a test runs."""

    def put(owner: Any, **values: Any) -> None:
        for name, value in values.items():
            monkeypatch.setattr(owner, name, value)

    return put


@pytest.fixture
def nothing_is_compiled() -> None:
    """Forgets what other tests have compiled in this process: no pass would be kept on a CPU."""
    from torch._dynamo.utils import counters

    counters.clear()


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the kernels run and write to buffers, and their first launch is not compared."""
    from moe_inspect.capture import rows
    from moe_inspect.capture.hook import first_launch, kernels
    from tests.support.streams import PromptStream

    if kernels.triton is None:
        pytest.skip("no triton on this platform")
    monkeypatch.setattr(kernels, "runs_triton", lambda tensor: True)
    monkeypatch.setitem(rows.SIDE_STREAMS, "cpu", PromptStream)
    run = lambda name, device, written, kernel, twin, *arguments: kernel(*arguments)  # noqa: E731
    monkeypatch.setattr(first_launch, "run", run)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """start(Vllm, …): a stand-in for an engine with the plugin, in this process."""
    from tests.support.engines import starting

    return starting(tmp_path, monkeypatch)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Up to how many slots the experts' weights are copied, instead of grouping the slots."""
    from moe_inspect.capture.hook import experts

    return lambda most: monkeypatch.setattr(experts, "are_few", lambda slots, E: slots <= most)
