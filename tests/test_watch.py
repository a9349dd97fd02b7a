"""watch: what it counts while a trace is written is what the trace holds, whatever its writer
does; and what the terminal shows of it."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.cells import cell_len
from rich.console import Console

from moe_inspect.errors import MoeInspectError
from moe_inspect.public import open_trace
from moe_inspect.reporting.render.heatmap import cells, extremes
from moe_inspect.simulate.placement.plan import placed_over
from moe_inspect.text import printable
from moe_inspect.trace.header import TraceHeader
from moe_inspect.trace.writer import ShardLimits, TraceWriter, drop_after, resume_point
from moe_inspect.watch.alarms import CALM
from moe_inspect.watch.follow import Follower, News, Piece
from moe_inspect.watch.rules import parse_rule
from moe_inspect.watch.state import Plan, Watched, WatchOptions, WatchSession, hot_text
from moe_inspect.watch.terminal import Screen, sparkline, status_line
from moe_inspect.watch.terminal import watch as watch_trace
from tests.support.damage import edit_manifest, restate
from tests.support.synthetic import encoder_decoder, uniform_ids, write_counts, write_trace
from tests.support.watched import WORDS, batches, committed, started, waited, writer, written
from tests.test_commit_every import counted
from tests.test_dropped import trace_of
from tests.test_trace import ROUTERS

AT_ONCE = 1e-9
L, E = 5, 8


def load_of(root: Path) -> np.ndarray:
    """int64 [L, E], counted from the tables."""
    trace = open_trace(root)
    tables = [trace.routing(router=r).filter(like="expert_") for r in range(len(trace.routers))]
    return np.array([np.bincount(table.to_numpy().ravel(), minlength=E) for table in tables])


class Looks:
    """A follower, and what is made of what it finds."""

    def __init__(self, path: str | Path, *settings: Any, **more: Any):
        self.follower, self.watched = Follower(path), Watched(*settings, **more)

    def look(self) -> News:
        news = self.follower.poll()
        self.watched.take(news, self.follower.header)
        return news

    @property
    def seen(self) -> tuple[str, int]:
        """Looks again: the status, and how many tokens there are."""
        return self.look().status, self.watched.tokens


# --- the follower


@pytest.mark.parametrize("every", [1, 5])
def test_what_is_counted_on_the_way_is_what_the_trace_holds(tmp_path: Path, every: int) -> None:
    """Shards are committed between any two looks at the trace."""
    root = tmp_path / "t"
    looks = Looks(root, 600)
    assert looks.look().status == "waiting"
    with writer(root, L, E, shard_tokens=600, commit_every=AT_ONCE) as open_writer:
        for n in committed(root, open_writer, batches(L, E, 12)):
            if n % every == 0:
                assert looks.seen == ("recording", n * 256)
                assert np.array_equal(looks.watched.total.load, load_of(root))
    news = looks.look()
    assert (news.status, news.left_tokens, looks.watched.tokens) == ("complete", 0, 12 * 256)
    assert np.array_equal(looks.watched.total.load, load_of(root))
    assert looks.watched.decisions == 12 * 256 * L
    assert looks.look().pieces == []


def test_the_window_is_the_last_tokens(tmp_path: Path) -> None:
    root, rows = tmp_path / "t", list(batches(L, E, 9))
    looks = Looks(root, 512)
    with writer(root, L, E, commit_every=AT_ONCE) as open_writer:
        for _ in committed(root, open_writer, rows):
            looks.look()
    watched = looks.watched
    assert watched.window is not None
    assert (watched.window.first, watched.window.last) == (7, 8)
    ids = [np.concatenate([b.ids[r] for b in rows[7:]]).ravel() for r in range(L)]
    expected = [np.bincount(of_router, minlength=E) for of_router in ids]
    assert np.array_equal(watched.window.load, expected)
    # a shard a sample, of which the last is that of the window
    assert len(watched.history) == 9
    busiest = np.array(expected).max(1) / np.array(expected).mean(1) - 1
    assert np.allclose(watched.history[-1], busiest)


def test_counts_are_followed_too(tmp_path: Path) -> None:
    root = tmp_path / "t"
    looks = Looks(root)
    how = {"counts_only": True, "limits": ShardLimits(250, commit_every=AT_ONCE)}
    with TraceWriter(root, {"capture": {"pid": os.getpid()}}, ROUTERS, **how) as open_writer:
        for n in range(5):
            open_writer.write(counted(n, 2))
            waited(lambda n=n: open_trace(root).n_tokens == 100 * (n + 1))
            if n % 2:  # several shards in one look
                assert looks.seen == ("recording", 100 * (n + 1))
    assert looks.seen == ("complete", 500)
    for r in range(len(ROUTERS)):
        expected = sum(counted(n, 2).assignments[r].sum(0) for n in range(5))
        assert np.array_equal(looks.watched.total.load[r], expected)


def test_two_stacks_see_their_own_tokens(tmp_path: Path) -> None:
    encoder_decoder(tmp_path / "t")
    (piece,) = Follower(tmp_path / "t").poll().pieces
    assert piece.tokens_R.tolist() == [6, 4]
    assert np.array(piece.load).tolist() == [[6, 0], [2, 2]]


def test_a_trace_that_is_resumed_or_begun_again_is_counted_anew(tmp_path: Path) -> None:
    root, rows = tmp_path / "t", list(batches(L, E, 6))
    looks = Looks(root)
    first = writer(root, L, E, shard_tokens=512, commit_every=AT_ONCE)
    assert list(committed(root, first, rows[:5])) == [1, 2, 3, 4, 5]
    assert looks.seen == ("recording", 5 * 256)
    first.close("interrupted")
    assert drop_after(root, 3) == 3
    point = resume_point(root)
    assert point.next_batch == 4
    assert looks.look().again
    assert looks.watched.tokens == 4 * 256
    written(root, L, E, 6, 4, shard_tokens=512, resume=point)
    assert looks.seen == ("complete", 6 * 256)
    assert np.array_equal(looks.watched.total.load, load_of(root))
    shutil.rmtree(root)
    assert looks.look().status == "waiting"
    written(root, 2, 4, 1)
    assert looks.seen == ("complete", 256)
    assert np.shape(looks.watched.total.load) == (2, 4)


def test_by_a_url(tmp_path: Path) -> None:
    import fsspec

    files, root = fsspec.filesystem("memory"), tmp_path / "t"
    looks = Looks(f"memory://{tmp_path.name}/t")
    assert looks.look().status == "waiting"
    with writer(root, L, E, commit_every=AT_ONCE) as open_writer:
        for n in committed(root, open_writer, batches(L, E, 3)):
            files.put(f"{root}/", f"{tmp_path.name}/t", recursive=True)
            assert looks.seen == ("recording", n * 256)
    files.put(f"{root}/", f"{tmp_path.name}/t", recursive=True)
    assert looks.look().status == "complete"
    assert np.array_equal(looks.watched.total.load, load_of(root))


def test_of_two_ranks_in_a_directory_one_is_followed_on(tmp_path: Path) -> None:
    """Whose traces have successors."""
    looks = Looks(tmp_path)

    def begun(name: str) -> TraceWriter:
        open_writer = writer(tmp_path / name, L, E, commit_every=AT_ONCE).__enter__()
        list(committed(tmp_path / name, open_writer, batches(L, E, 2)))
        return open_writer

    writers = {rank: begun(f"{rank}-0000") for rank in ("other", "followed")}
    assert looks.seen == ("recording", 512)
    followed = looks.follower.path.name.removesuffix("-0000")
    for rank in sorted(writers, key=followed.__eq__):  # the other one first
        writers[rank].at_close = {"capture": {"followed_by": f"{rank}-0001"}}
        writers[rank].close()
        writers[rank] = begun(f"{rank}-0001")
        looks.look()
    looks.look()
    assert looks.follower.path.name == f"{followed}-0001"
    assert looks.seen == ("recording", 1024)
    for open_writer in writers.values():
        open_writer.close()


def test_of_a_directory_of_traces_the_newest_is_followed(tmp_path: Path) -> None:
    """Also one that comes later: of its tokens alone. Two that are written do not take turns."""
    place = tmp_path / "runs"
    looks = Looks(place)
    assert looks.seen == ("waiting", 0)
    for n, name in ((1, "z"), (2, "old")):
        written(place / name, L, E, n)
        os.utime(place / name / "trace.json", (n, n))
    assert looks.seen == ("complete", 512)
    assert looks.follower.path == place / "old"
    with (
        writer(place / "b", L, E, commit_every=AT_ONCE) as b,
        writer(place / "a", L, E, commit_every=AT_ONCE) as a,
    ):
        os.utime(place / "b" / "trace.json", (3, 3))
        assert looks.seen == ("recording", 0)
        assert looks.follower.path == place / "a"
        for _ in committed(place / "b", b, batches(L, E, 2)):
            assert looks.seen == ("recording", 0)
        for n in committed(place / "a", a, batches(L, E, 2)):
            assert looks.seen == ("recording", n * 256)
    assert looks.seen == ("complete", 512)
    (place / ".draft.tmp").mkdir()
    shutil.copy(place / "z/trace.json", place / ".draft.tmp")
    assert looks.seen == ("complete", 512)


def test_an_import_is_followed_where_it_is_written(tmp_path: Path) -> None:
    draft, target = tmp_path / f".t.{os.getpid()}-ab12.tmp", tmp_path / "t"
    looks = Looks(target)
    with writer(draft, L, E, commit_every=AT_ONCE) as open_writer:
        for _ in committed(draft, open_writer, batches(L, E, 1)):
            assert looks.seen == ("recording", 256)
    os.replace(draft, target)
    assert looks.seen == ("complete", 256)


def test_a_killed_writer_is_noticed(tmp_path: Path) -> None:
    root = tmp_path / "t"
    process = started(root, 4, 8, 1000, 0.02)
    looks = Looks(root)
    waited(lambda: looks.look() and looks.watched.tokens)
    assert looks.watched.status == "recording"
    process.kill()
    process.wait()
    waited(lambda: looks.look().status == "killed")
    assert looks.follower.writer == f"process {process.pid}"
    assert np.array_equal(looks.watched.total.load, load_of(root))
    console = Console(file=io.StringIO(), width=80)
    with pytest.raises(MoeInspectError, match=f"process {process.pid} is gone: it was stopped"):
        watch_trace(root, WatchOptions(every_s=0.01), console)


@pytest.fixture
def one_pass(tmp_path: Path) -> Path:
    return written(tmp_path / "t", L, E, 1)


def test_what_is_left_to_be_counted_is_said_and_is_no_rate(tmp_path: Path) -> None:
    """As much is counted in a look as takes no long time; here that is one shard."""
    root = written(tmp_path / "t", L, E, 4, shard_tokens=256)
    ticks, now = itertools.count(0, 1_000), [0.0]
    session = WatchSession(root, WatchOptions())
    session.follower = Follower(root, clock=lambda: next(ticks))
    session.watched = Watched(clock=lambda: now[0])
    for now[0], left in ((0.0, 768), (1.0, 512), (2.0, 256), (12.0, 0)):
        session.update()
        said = f"{left:,} to be counted"
        assert (said in status_line(session)) == (said in shown(session, 120, 24)[1]) == bool(left)
    assert np.array_equal(session.watched.total.load, load_of(root))
    assert session.watched.rates() == pytest.approx((256 / 10, 256 * L / 10))


def test_an_expert_that_no_router_has_is_damage(one_pass: Path) -> None:
    path = next(one_pass.glob("routing/*.parquet"))
    table = pq.read_table(path)
    ids = np.full(len(table), E + 4, np.uint8)
    at = table.column_names.index("expert_1")
    table = table.set_column(at, table.schema.field(at), pa.array(ids))
    pq.write_table(table, path)
    restate(one_pass, f"routing/{path.name}")
    follower = Follower(one_pass)
    troubles = [follower.poll().trouble for _ in range(2)]
    assert f"an assignment to expert {E + 4} of layer 0, which has {E} experts" in troubles[1]


def test_damage_that_stays_is_an_error(one_pass: Path) -> None:
    (one_pass / "routing/part-0-0.parquet").write_bytes(b"PAR1")
    follower = Follower(one_pass)
    troubles = [follower.poll().trouble for _ in range(4)]
    assert troubles[0] == ""  # a file may be replaced meanwhile
    assert all("routing/part-0-0.parquet" in trouble for trouble in troubles[1:])
    with pytest.raises(MoeInspectError, match="routing/part-0-0"):
        follower.poll()


def test_only_the_trace_of_a_process_is_waited_for(one_pass: Path) -> None:
    assert Follower(one_pass, of_process=os.getpid()).poll().status == "complete"
    assert Follower(one_pass, of_process=os.getpid() + 1).poll().status == "waiting"


# --- what is made of it


def a_piece(load: list[int], first: int = 0) -> Piece:
    whole = {"tokens": sum(load), "decisions": sum(load)}
    return Piece(first, first, [np.array(load)], np.array([sum(load)]), **whole)


@pytest.fixture
def header(tmp_path: Path) -> TraceHeader:
    """Of one router of four experts."""
    return write_counts(tmp_path / "t", [np.full((1, 4), 100)], 1)


def test_rates_are_of_the_last_minute(header: TraceHeader) -> None:
    now = [0.0]
    watched = Watched(clock=lambda: now[0])
    for n in range(100):
        now[0] = 2.0 * n
        pieces = [a_piece([10, 10, 10, 10 + 40 * (n > 50)], n)]
        watched.take(News("recording", pieces), header)
        assert (watched.rates() is None) == (n == 0)
    assert (watched.rates() or [0])[0] == pytest.approx(80 / 2)
    now[0] += 500
    assert watched.changed_s == 500
    assert 0 < (watched.rates() or [0])[0] < 6


def test_a_rate_and_how_long_nothing_came_are_on_the_screen(
    header: TraceHeader, tmp_path: Path
) -> None:
    now = [0.0]
    session = WatchSession(tmp_path / "t", WatchOptions())
    session.watched = Watched(clock=lambda: now[0])
    for now[0] in (0.0, 2.0):
        session.watched.take(News("recording", [a_piece([10, 10, 10, 10], int(now[0]))]), header)
    assert "20 tokens/s" in status_line(session)
    assert "20 tokens/s, 20 decisions/s" in shown(session, 120, 24)[1]
    assert "last " not in shown(session, 120, 24)[1]
    now[0] = 9.0
    assert "last 7 s ago" in shown(session, 120, 24)[1]


def test_alarms_judge_windows_and_end_with_the_fault(header: TraceHeader) -> None:
    watched, said = Watched(1_000, [parse_rule("dead_experts > 0 for 2 windows")]), []
    calm, dead = [[240, 260, 240, 260], [260, 240, 260, 240]] * 2, [[500, 500, 0, 0]] * 3
    for n, load in enumerate([*calm, *dead, *calm[:CALM]]):
        watched.take(News("recording", [a_piece(load, n)], again=n == 0), header)
        said.append(len(watched.alarms))
    assert said == [0] * 4 + [0, 1, 1] + [1] * (CALM - 1) + [0]
    assert watched.raised[0].experts == (2, 3)
    assert watched.raised[0].since == 4
    assert "since pass 4" in watched.raised[0].text


def test_a_history_of_training_is_judged_as_it_was_committed(tmp_path: Path) -> None:
    """Each shard is a window, whatever its tokens; its steps follow those of the one before."""
    manifest = {"capture": {"pid": os.getpid()}, "training": {}}
    with TraceWriter(tmp_path / "t", manifest, ROUTERS[:1], counts_only=True) as history:
        for n in range(4):
            load = np.full((1, 8), 400)
            load[0, 5] = 0 if n > 1 else 400
            sums = {"first_choice": [load * 0], "sums": {"weight_sum": [load * 0]}}
            part = counted(10 * (n + 1), 1)
            history.write(replace(part, tokens=1600, assignments=[load], **sums))
    looks = Looks(tmp_path / "t", 10**6, [parse_rule("dead_experts > 0 for 2 windows")])
    looks.look()
    watched = looks.watched
    (alarm,) = (found for found in watched.alarms if found.layer == 1)
    assert (alarm.layer, alarm.experts, alarm.since, alarm.step) == (1, (5,), 21, 40)
    assert "since step 21" in alarm.text


def test_rules_on_what_no_trace_holds_are_refused() -> None:
    with pytest.raises(MoeInspectError, match="a trace does not hold z_loss"):
        Watched(rules=[parse_rule("z_loss > 1")])


@pytest.mark.parametrize("drops", [True, False])
def test_a_rule_on_drops_needs_a_trace_that_states_them(drops: bool, tmp_path: Path) -> None:
    """Else it would never be an alarm, however much is dropped."""
    path = str(trace_of(tmp_path / "t", [0.0, 0.29], drops).path)
    console = Console(file=(said := io.StringIO()), width=200)
    options = WatchOptions(rules=[parse_rule("drop_rate > 0.1")], window_tokens=1000)
    if drops:
        watch_trace(path, options, console)
        assert "drop_rate" in said.getvalue()
        return
    with pytest.raises(MoeInspectError, match="does not state that its empty slots are drops"):
        watch_trace(path, options, console)
    watch_trace(path, WatchOptions(rules=[parse_rule("max_vio > 5")]), console)


# --- a plan of placement


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """Of four experts on two GPUs: 0 and 1, 2 and 3."""
    path = tmp_path / "plan.json"
    path.write_text('{"physical_to_logical_map": [[0, 1, 2, 3]]}')
    return path


def over(plan: Path, gpus: int = 2) -> Plan:
    return partial(placed_over, plan, gpus)


def test_a_plan_that_no_longer_fits_the_traffic(header: TraceHeader, plan: Path) -> None:
    watched, said = Watched(1_000, plan=over(plan)), []
    fits, drifted = [[400, 100, 300, 200]] * 4, [[400, 300, 200, 100]] * 3
    for n, load in enumerate([*fits, *drifted, *fits[:CALM]]):
        watched.take(News("recording", [a_piece(load, n)], again=n == 0), header)
        said.append(len(watched.alarms))
        assert watched.gpu_load == pytest.approx([1.4 if load in drifted else 1])
    assert said == [0] * 6 + [1] * CALM + [0]
    (alarm,) = watched.raised
    assert "gpu_max_over_mean up from 1 since pass 4, now 1.4" in alarm.text
    assert "simulate placement" in alarm.help


@pytest.mark.parametrize(("rule", "least", "most"), [("", 0, 1), (" even by chance", 15, 20)])
def test_chance_is_no_drift_of_a_plan(
    rule: str, least: int, most: int, header: TraceHeader, plan: Path
) -> None:
    """Of 20 recordings of tokens that choose at random; and without the judgement of chance."""
    rng, raised = np.random.default_rng(0), 0
    for _ in range(20):
        rules = [parse_rule(f"gpu_max_over_mean rising by 0.1{rule}")]
        watched = Watched(60, rules, plan=over(plan))
        for n in range(30):
            load = rng.multinomial(60, [0.25] * 4).tolist()
            watched.take(News("recording", [a_piece(load, n)], again=n == 0), header)
        raised += bool(watched.raised)
    assert least <= raised <= most


def test_a_plan_of_other_experts_is_refused(header: TraceHeader, plan: Path) -> None:
    with pytest.raises(MoeInspectError, match="needs a plan: moe-inspect watch --plan"):
        Watched(rules=[parse_rule("gpu_max_over_mean > 2")])
    with pytest.raises(MoeInspectError, match="4 slots cannot be split over 3 GPUs"):
        Watched(plan=over(plan, 3)).take(News("recording", []), header)
    plan.write_text('{"physical_to_logical_map": [[0, 1, 2]]}')
    watched = Watched(plan=over(plan))
    for _ in range(2):  # it stays refused
        with pytest.raises(MoeInspectError, match="layer 0 does not place its 4 experts"):
            watched.take(News("recording", [a_piece([10, 10, 10, 10])]), header)
        assert not watched.tokens


def test_the_busiest_gpu_is_on_the_screen(one_pass: Path, plan: Path) -> None:
    plan.write_text(json.dumps({"physical_to_logical_map": [[*range(E)]] * L}))
    session = WatchSession(one_pass, WatchOptions(plan=over(plan)))
    session.update()
    trace = open_trace(one_pass)
    of_gpus = load_of(one_pass).reshape(len(trace.routers), 2, -1).sum(2)
    ratio_L = of_gpus.max(1) / of_gpus.mean(1)
    r = int(ratio_L.argmax())
    layer = trace.routers[r].layer
    said = f"busiest GPU {ratio_L[r]:.2f}x (layer {layer})"
    assert said in "\n".join(shown(session, 120, 24))
    assert said in status_line(session)
    assert session.watched.gpu_load == pytest.approx(ratio_L)


def test_of_a_text_there_is_none_where_no_token_of_it_is_known(tmp_path: Path) -> None:
    first = next(batches(L, E, 1))
    words = [f" {WORDS[i]}" for i in first.token_id.tolist()]
    for name, token_id in (("known", first.token_id), ("unknown", np.full(256, 99, np.int32))):
        with writer(tmp_path / name, L, E) as open_writer:
            open_writer.write(replace(first, token_id=token_id))
    known, unknown = (open_trace(tmp_path / name).shard(0) for name in ("known", "unknown"))
    used = int(first.ids[3][-1, 0])
    text = hot_text(known, 3, used)
    assert text is not None
    of_text = [word for word, _ in text.words]
    assert of_text == list(map(printable, words[-len(of_text) :]))
    assert text.words[-1][1]
    assert hot_text(unknown, 3, used) is None
    assert hot_text(known, 3, E) is None  # no token goes there


def test_a_trace_that_is_begun_again_without_text_shows_none(one_pass: Path) -> None:
    session = WatchSession(one_pass, WatchOptions())
    session.update()
    assert session.text is not None
    shutil.rmtree(one_pass)
    write_counts(one_pass, [np.full((1, 4), 100)], 1)
    session.update()
    assert session.watched.tokens == 400
    assert session.text is None


# --- the terminal


def shown(session: WatchSession, width: int, height: int, file: Any = None) -> list[str]:
    size: dict[str, Any] = {"width": width, "height": height, "color_system": None}
    console = Console(file=file or io.StringIO(), force_terminal=True, **size)
    lines = console.render_lines(Screen(session), console.options.update(height=height), pad=False)
    return ["".join(segment.text for segment in line) for line in lines]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> WatchSession:
    root = tmp_path_factory.mktemp("watch") / "t"
    session = WatchSession(root, WatchOptions(window_tokens=512))
    with writer(root, L, E, commit_every=AT_ONCE) as open_writer:
        for _ in committed(root, open_writer, batches(L, E, 10)):
            session.update()
    session.update()
    return session


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 50), (40, 10), (20, 5)])
def test_the_view_fits_the_terminal(session: WatchSession, width: int, height: int) -> None:
    lines = shown(session, width, height)
    assert len(lines) <= height
    assert all(cell_len(line) <= width for line in lines)
    assert lines[0].startswith("watch ")


def test_the_view_says_what_there_is(session: WatchSession) -> None:
    lines = shown(session, 100, 24)
    text = "\n".join(lines)
    assert "complete" in lines[0]
    assert "2,560 tokens · 12,800 decisions" in lines[1]
    assert "load ÷ mean, last 512 tokens" in text
    # layer by layer: of layer 3 expert 1 has most, expert 2 nothing
    assert [line[:2].strip() for line in lines[4 : 4 + L]] == [str(n) for n in range(L)]
    assert lines[3].split() == [str(e) for e in range(E)]
    of_layer_3 = [float(ratio) for ratio in lines[4 + 3].split()[1:]]
    assert of_layer_3[2] == 0.0
    assert max(of_layer_3) == of_layer_3[1] > 2
    narrow = shown(session, 40, 24)
    assert narrow[4 + 3].split()[1][1:3] == "▆×"
    worst = next(line for line in lines if line.startswith("layer 3"))
    assert "busiest expert 1, 1 dead" in worst
    assert worst.rstrip()[-1] in "▇█"
    assert any(line.startswith("• Layer 3, expert 2: dead_experts above 0") for line in lines)
    assert "last text for expert 1 of layer 3" in text
    assert " mat" in text
    assert "\x1b" not in text  # of the vocabulary
    assert r"\x1b[31m" in text


def test_alarms_that_have_no_room_are_counted(tmp_path: Path) -> None:
    rules = [parse_rule("max_vio > 0 even by chance")]
    root = written(tmp_path / "t", L, E, 8, shard_tokens=256)
    session = WatchSession(root, WatchOptions(window_tokens=256, rules=rules))
    session.update()
    assert len(session.watched.alarms) == L
    lines = shown(session, 100, 24)
    assert sum("max_vio above 0" in line for line in lines) == 1
    assert any(f"and {L - 1} more alarms" in line for line in lines)
    assert sum("max_vio above 0" in line for line in shown(session, 100, 80)) == L


def test_without_colour_and_without_unicode_it_can_be_read(
    session: WatchSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    of_map = shown(session, 40, 24, file)[4 : 4 + L]
    assert all(line.isascii() for line in of_map)
    assert of_map[3].split()[1][1:3] == "*x"

    def printed() -> str:
        file = io.StringIO()
        size: dict[str, Any] = {"width": 80, "height": 24, "force_terminal": True}
        Console(file=file, color_system="truecolor", **size).print(Screen(session))
        return file.getvalue()

    assert "8;2;" not in printed()
    monkeypatch.delenv("NO_COLOR")
    assert "8;2;" in printed()  # control


def test_many_layers_and_experts_share_a_cell() -> None:
    ratio = np.array([1.0, 1.0, 1.0, 0.0, 1.0, 9.0, np.nan])
    assert cells(extremes(ratio, 2), False, True).plain == "▄×█"
    assert cells(extremes(ratio * np.nan, 2), False, True).plain == "no load"
    of_layers = extremes(np.array([[1.0, 0.5], [3.0, 1.5], [1.0, 2.0]]).T, 2).T
    assert of_layers.tolist() == [[3.0, 0.5], [1.0, 2.0]]


def test_a_sparkline_is_flat_where_chance_explains_it() -> None:
    values = np.array([0.1, 0.2, np.nan, 0.1])
    assert sparkline(values, 0.8, "12345678") == "23 2"
    assert sparkline(values, 0.0, "12345678") == "58 5"


def test_in_a_pipe_it_is_a_line_for_each_change(session: WatchSession, capsys: Any) -> None:
    console = Console(width=500)
    watch_trace(session.path, WatchOptions(every_s=0.01, window_tokens=512), console)
    (line,) = capsys.readouterr().out.splitlines()
    assert "complete, 2,560 tokens, busiest expert of layer 3 " in line
    assert "x the mean load (by chance at most " in line
    at_once = WatchSession(session.path, session.options)
    at_once.update()
    assert line.split(" ", 1)[1] == status_line(at_once).split(" ", 1)[1]


def test_in_a_pipe_a_line_says_that_it_waits_for_the_trace(
    one_pass: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there"
    monkeypatch.setattr(time, "sleep", lambda _: there.exists() or shutil.copytree(one_pass, there))
    watch_trace(there, WatchOptions(every_s=0.01), Console(width=500))
    waits, *_, complete = capsys.readouterr().out.splitlines()
    assert waits == f"waiting for a trace at {there}"
    assert "complete" in complete


def test_an_interrupted_trace_ends_it_with_an_error(one_pass: Path) -> None:
    edit_manifest(one_pass, status="interrupted")
    assert Follower(one_pass).poll().status == "interrupted"
    with pytest.raises(MoeInspectError, match="closed before its end; it holds 256 tokens"):
        watch_trace(one_pass, WatchOptions(), Console(file=io.StringIO()))


# --- in a real terminal


def test_beside_a_trace(one_pass: Path) -> None:
    """trace --watch: what is watched ends with the trace; an old one there is not taken for it."""
    command = [sys.executable, "-m", "moe_inspect", "trace", "demo", "-o", str(one_pass)]
    command += ["--max-tokens", "2000", "--batch-tokens", "256", "--device", "cpu", "--overwrite"]
    command += ["--watch", "--commit-every", "50ms"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, "")
    lines = done.stderr.splitlines()
    assert "256 tokens" not in lines[0]
    total = f"{open_trace(one_pass).n_tokens:,} tokens"
    assert any(" complete, " in line and total in line for line in lines)


def tmux(*arguments: str) -> str:
    done = subprocess.run(["tmux", *arguments], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.skipif(
    shutil.which("tmux") is None and not os.environ.get("REQUIRE_TMUX"),
    reason="no tmux here: apt-get install tmux",
)
@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 50)])
def test_under_tmux_while_a_trace_is_written_and_its_writer_killed(
    tmp_path: Path, width: int, height: int
) -> None:
    root, name = tmp_path / "t", f"moe-inspect-{os.getpid()}-{width}"
    command = f"{sys.executable} -m moe_inspect watch {root} --window 512 --every 200ms; sleep 60"
    tmux("-L", name, "new-session", "-d", "-x", str(width), "-y", str(height), command)
    try:
        screen = lambda: tmux("-L", name, "capture-pane", "-p").splitlines()  # noqa: E731
        waited(lambda: any("waiting for a trace" in line for line in screen()))
        process = started(root, 61, 256, 1000, 0.1)

        def is_shown() -> bool:
            lines = screen()
            return (
                f"recording by process {process.pid}" in lines[0]
                and "tokens/s" in lines[1]
                and "; cells: most extreme of " in lines[2]
                and any(line.startswith("layer 3 ") for line in lines)
                and any(line.startswith("alarms  ") and "now" in line for line in lines)
            )

        waited(is_shown)
        # it is drawn again and again, at the same place
        for _ in range(8):
            time.sleep(0.1)
            lines = screen()
            titles = [line for line in lines if line.startswith(("watch ", "alarms  "))]
            assert len(titles) == 2, lines
        process.kill()
        process.wait()
        # the view is gone from the alternate screen; its last state and the error stay
        waited(lambda: any(line.startswith("error: process") for line in screen()))
        text = "\n".join(screen())
        assert "is gone: it was stopped before the end" in text.replace("\n", "")
        assert "least balanced layers" in text
    finally:
        tmux("-L", name, "kill-server")


def test_several_windows_tell_what_chance_explains(tmp_path: Path) -> None:
    ids = uniform_ids(np.random.default_rng(0), 40_000, 8, 2)
    write_trace(tmp_path / "t", [ids], 8, shard_tokens=4_000, batch_tokens=4_000)
    session = WatchSession(tmp_path / "t", WatchOptions(window_tokens=4_000))
    session.update()
    assert 1 < float(session.watched.by_chance(0).removesuffix("x")) < 1.3
