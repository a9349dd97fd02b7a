"""The tests of counting, evidence, verdict, writer, reader and importers can fail:
each mistake of this list, put in on purpose, makes one of them do so. The kernels' and the ring's
are in test_mutations."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from tests.support.mutation import fails, mutation
from tests.support.synthetic import thirty_documents

pytestmark = pytest.mark.slow

Check = Callable[[Path], None]


def by(name: str, *arguments: object) -> Check:
    """A test of another file, with its arguments but for the fixtures that are known here."""
    file, _, function = name.partition(".")
    test = getattr(import_module(f"tests.test_{file}"), function)
    fixtures = {"tmp_path", "monkeypatch", "copied"}.intersection(
        named := inspect.signature(test).parameters
    )
    given = dict(zip((name for name in named if name not in fixtures), arguments, strict=True))
    # a case that is none of the test's would fail without a mistake
    for mark in getattr(test, "pytestmark", ()):
        if mark.name == "parametrize":
            of, cases = mark.args
            names = of.split(", ") if isinstance(of, str) else of
            listed = [[*case] if len(names) > 1 else [case] for case in cases]
            assert [given[name] for name in names] in listed, name

    def check(path: Path) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            made: dict[str, object] = {"tmp_path": path, "monkeypatch": monkeypatch}
            if "copied" in fixtures:
                made["copied"] = path / "t"
                thirty_documents(path / "t")
            test(**given, **{name: made[name] for name in fixtures})

    return check


def by_sentence(case: str) -> Check:
    return by("verdict_thresholds.test_sentences", case)


def by_format(name: str) -> Check:
    return by("import.test_what_was_written_comes_back", name)


by_hand = by("aggregate.test_counts_are_those_of_counting_by_hand")
sums = by("counting.test_sums_that_must_hold")
merging = by("counting.test_merging_is_associative_and_commutative_and_leaves_the_parts_alone")
two_stacks = by("counting.test_an_encoder_and_a_decoder_have_tokens_of_their_own")
in_sequences = by("counting.test_repetition_follows_a_sequence_across_batches")
logits = by("counting.test_what_logits_and_weights_say_by_hand")
of_pairs = by("compare_tables.test_the_loops_over_decisions", 371, 5, 5)
written_in_order = by("slot_order.test_slots_are_written_in_descending_weight", "float16", 0.2)
older_in_order = by("slot_order.test_older_traces_with_weights_are_put_in_order_while_read", 0.2)
on_disk = by("trace.test_everything_is_on_disk_before_anything_speaks_of_it")
changed = by("damage.test_a_changed_footer_or_page_of_a_large_file_is_found")
resumed = by("trace.test_uncommitted_files_are_ignored_and_resume_deletes_them")


MUTATIONS = {
    # verdict
    "averaging: half becomes twice": ("reporting.verdict.balance", 'row["max_vio"] / 2)', 'row["max_vio"] * 2)', by_sentence("pooled shows half")),
    "least used: within chance": ("reporting.verdict.experts", 'if row["least_used_p"] < ALPHA]', "]", by_sentence("little used by chance")),
    "dead: chance is taken for death": ("reporting.verdict.experts", "if likely > 0.01:", "if likely > 0.5:", by_sentence("dead by chance")),
    "a domain overloads as all do": ("reporting.verdict.experts", " & (excess_D > most)", "", by_sentence("little more than all together")),
    "passes: no floor": ("reporting.verdict.balance", ' - floor', "", by_sentence("by pass, as chance")),
    "uneven: by chance": ("reporting.verdict.findings", 'return row["busiest_p"] < ALPHA', "return True", by_sentence("within chance")),
    "signs: each router has its own": ("analysis.metrics.chance", "random_signs(len(residual_UE))", "np.random.permutation(random_signs(len(residual_UE)))", by("chance.test_what_is_the_same_at_two_routers_is_one_case")),
    "specialised: by chance": ("reporting.verdict.specialization", 'table[table["domain_mi_p"] < ALPHA]', 'table[table["domain_mi_p"] <= 1]', by("verdict_thresholds.test_domains", "within chance")),
    # chance
    "whole passes are of one size": ("analysis.metrics.balance", "2 * tokens_S >= tokens_S.max", "tokens_S == tokens_S.max", by("balance.test_by_hand_on_two_routers_of_four_experts")),
    "design effect without n/(n − 1)": ("analysis.metrics.uncertainty", ".sum()) * n / (n - 1)", ".sum())", by("uncertainty.test_the_design_effect_by_hand")),
    "Gaussian floor without E/(E − 1)": ("analysis.metrics.uncertainty", "/ mean_load * E / (E - 1))", "/ mean_load)", by("uncertainty.test_the_gaussian_floor_by_hand")),
    "floor of independent picks": ("analysis.metrics.uncertainty", "picks_J1 / (E - e)", "k / E + 0 * picks_J1", by("uncertainty.test_noise_floor_is_what_drawing_gives", 20, 16, 4)),
    "n of n documents are drawn": ("analysis.metrics.uncertainty", "rng.multinomial(n - 1, np.full(n, 1 / n), size=R) * (n / (n - 1))", "rng.multinomial(n, np.full(n, 1 / n), size=R) * 1.0", by("uncertainty.test_resampling_keeps_the_variance_of_a_mean")),
    "a 90 % interval": ("analysis.metrics.uncertainty", "[0.025, 0.5, 0.975]", "[0.05, 0.5, 0.95]", by("uncertainty.test_an_interval_leaves_out_a_fortieth_at_each_end")),
    # pairs
    "evidence: as if one pair were tested": ("reporting.tables.pairs", "np.log10(ALPHA / self.tested)", "np.log10(ALPHA)", by("pairs.test_one_pair_in_so_many_is_chance")),
    "evidence: one tail": ("analysis.metrics.uncertainty", "(log_tail + np.log(2)) / np.log(10)", "log_tail / np.log(10)", by("pairs.test_tails_are_the_binomial_ones_far_out_too")),
    "evidence: repeated tokens count": ("reporting.tables.pairs", "effect = load.at_least_1(self.effect)", "effect = 1.0", by("pairs.test_one_pair_in_so_many_is_chance")),
    "pairs by chance: of independent choices": ("analysis.metrics.pairs", "pair_EE *= weight_E[:, None] * weight_E", "pair_EE[:] = 1", by("pairs.test_chance_is_exact_also_where_experts_are_in_nearly_all_decisions", 9, 3, 2.5, 1.0)),
    # counting
    "unknown first choices are counted": ("analysis.counting.router_counts", "first_DE if ranked else None, None", "first_DE, None", by("counting.test_what_hangs_on_a_first_choice_is_unknown_without_one")),
    "unknown first choices repeat": ("analysis.counting.router_counts", "first_same_U if of.router.first_choice_known else None", "first_same_U", by("counting.test_what_hangs_on_a_first_choice_is_unknown_without_one")),
    "unknown first choices of counts": ("analysis.counting.count_shard", " and router.first_choice_known", "", by("slot_order.test_counts_recorded_before_the_order_was_stated_have_no_first_choices")),
    "first choices of the second slot": ("analysis.counting.kernels_numpy", "slots[:1], of.D, E)", "slots[1:2], of.D, E)", by_hand),
    "weights are of one domain": ("analysis.counting.router_counts", "self.kernels.weight_sum(rows.domain_T, self.slots", "self.kernels.weight_sum(rows.domain_T * 0, self.slots", by_hand),
    "weights of the first slot": ("analysis.counting.kernels_numpy", "np.concatenate(weights), size", "np.concatenate(weights[:1] * len(weights)), size", by_hand),
    "nowhere is an expert": ("analysis.counting.kernels_numpy", "(first_T.astype(narrow) + np.stack(slots))", "(first_T.astype(narrow) + np.minimum(np.stack(slots), E - 1))", by_hand),
    "what routed nowhere is not told": ("analysis.counting.router_counts", "of.router.top_k * len(of.slots[0]) - int(load_BE.sum())", "0 * int(load_BE.sum())", by_hand),
    "pairs over the edges of sequences": ("analysis.counting.kernels_numpy", "same_T = np.r_[False, (d[1:] == d[:-1]) & (s[1:] == s[:-1])]", "same_T = np.r_[False, d[1:] == d[:-1]]", in_sequences),
    "pairs over gaps": ("analysis.counting.kernels_numpy", "same_T & np.r_[False, p[1:] == p[:-1] + 1]", "same_T & np.r_[False, p[1:] > p[:-1]]", by("counting.test_tokens_that_do_not_follow_each_other_are_no_pair")),
    "tokens in the order of the trace": ("analysis.counting.kernels_numpy", "if not later_T.all():", "if False:", in_sequences),
    "pairs of slots: each with itself": ("analysis.counting.kernels_numpy", "slots[j:], E, E)", "slots[j - 1 :], E, E)", sums),
    "windows a token late": ("analysis.counting.count_shard", "windows.of(shard, seen.number_T) if windows", "windows.of(shard, seen.number_T + 1) if windows", by("counting.test_windows_by_hand")),
    "windows begin anew in every shard": ("analysis.counting.count_shard", "(self.before[shard.files.rank, shard.files.index] + number_T)", "(0 + number_T)", by("counting.test_windows_by_hand")),
    "ties: the rank before": ("analysis.counting.kernels_numpy", "ranked_TE[:, k - 1] - ranked_TE[:, k] if", "ranked_TE[:, k - 2] - ranked_TE[:, k - 1] if", logits),
    "merged: the last part alone": ("analysis.counting.router_counts", "mine[there] += theirs", "mine[there] = theirs", merging),
    "merged: passes of one part": ("analysis.counting.router_counts", "before + n, sum_before + vio", "n, vio", merging),
    "an encoder's tokens are the decoder's": ("trace.schema", '(stack == "encoder") == (phase == "encode")', '(stack == "encoder") != (phase == "encode")', two_stacks),
    # comparison
    "compared: what was lost is gained": ("comparison.counting.kernels", "(a_KN, lost_KN, -1)", "(a_KN, lost_KN, 1)", of_pairs),
    "compared: nowhere is an expert": ("comparison.counting.kernels", "a_KN != E, b_KN != E", "a_KN >= 0, b_KN >= 0", of_pairs),
    "compared: flips of the first slot alone": ("comparison.counting.kernels", "b_KN[None, :, part]", "b_KN[None, :1, part]", of_pairs),
    "compared: units of another size": ("comparison.counting.kernels", "unit_N * total_VX.shape[1]", "unit_N * total_VX.shape[0]", of_pairs),
    # writer
    "slots stay as they came": ("trace.writer.tables", "experts_KT = np.take_along_axis(experts_KT, order_KT, 0)", "pass", written_in_order),
    "weights stay where they were": ("trace.writer.tables", "values_KT = np.take_along_axis(values_KT, order_KT, 0)", "pass", written_in_order),
    "nowhere comes first": ("trace.slot_order", "np.float32(-np.inf)", "np.float32(np.inf)", written_in_order),
    "equal weights are turned round": ("trace.slot_order", 'np.argsort(-key_KT, axis=0, kind="stable")', 'np.argsort(key_KT, axis=0, kind="stable")[::-1]', written_in_order),
    "in order as a whole, not each": ("trace.slot_order", "(key_KT[:-1] >= key_KT[1:]).all()", "(key_KT[:-1] >= key_KT[1:]).any()", by("slot_order.test_what_is_in_order_is_left_alone")),
    "resumed from a token twice": ("trace.writer", "next_token=shards[-1].last_token + 1", "next_token=shards[-1].last_token", resumed),
    "resumed from a batch twice": ("trace.writer", "next_batch=shards[-1].last_batch + 1", "next_batch=shards[-1].last_batch", resumed),
    "the next shard begins where this one does": ("trace.writer", "self.next_token += tokens", "self.next_token += 0", resumed),
    "a group is cut in two": ("trace.writer.batches", "if batch.group is not None and batch.group ==", "if False and batch.group ==", by("trace.test_a_group_is_committed_together_or_not_at_all", True)),
    "half a group is kept": ("trace.writer.batches", "sum(b.group != group for b in self.batches)", "sum(True for b in self.batches)", by("trace.test_a_group_is_committed_together_or_not_at_all", False)),
    "sequences are cut": ("trace.writer.batches", "return not continued or", "return True or", by("counting.test_a_generated_sequence_stays_in_one_shard", 20)),
    "directories are not synchronised": ("trace.writer.tables", "sync(root / table)", "pass", on_disk),
    "nor is the manifest's": ("trace.files.atomic", "sync(path.parent)", "pass", on_disk),
    "nor files": ("trace.files.atomic", "os.fsync(file) os.replace(draft, target)", "os.replace(draft, target)", on_disk),
    "nor lines": ("trace.files.atomic", "os.fsync(file.fileno()) except", "pass\n    except", on_disk),
    # what is in the way of a trace
    "files of others are removed": ("trace.output_dir", "if others or not is_trace:", "if not is_trace:", by("output_dir.test_what_is_no_trace_is_not_overwritten_and_named", "a file beside")),
    "what only has the name of a manifest is one": ("trace.output_dir", 'if not (isinstance(found, dict) and "format" in found):', "if False:", by("output_dir.test_what_is_no_trace_is_not_overwritten_and_named", "a profiler's over ours")),
    "links are followed and emptied": ("trace.output_dir", "entry.is_dir(follow_symlinks=False)", "entry.is_dir()", by("output_dir.test_what_is_no_trace_is_not_overwritten_and_named", "a table elsewhere")),
    "the manifest goes last": ("trace.output_dir", "if schema.MANIFEST in there.files:\n            os.replace", "if False:\n            os.replace", by("output_dir.test_the_manifest_goes_first_and_whoever_comes_next_goes_on")),
    "a lock that another holds": ("trace.files.lock", "(got and is_at(file, root / LOCK))", "is_at(file, root / LOCK)", by("output_dir.test_ranks_share_a_lock_and_any_of_them_keeps_another_job_out")),
    "a lock of another holder is joined": ("trace.files.lock", "if _holder_in(file) != holder:", "if False:", by("output_dir.test_ranks_share_a_lock_and_any_of_them_keeps_another_job_out")),
    "generated tokens take no room": ("capture.corpus.plan", "(len(row.ids) + generate * row.continued) > batch_tokens", "len(row.ids) > batch_tokens", by("generate.test_the_plan")),
    # reader
    "older traces are not put in order": ("trace.shard", "if not slots or (", "if True or (", older_in_order),
    "a torn line is taken": ("trace.shard_list", 'data[: data.rfind(b"\\n") + 1]', 'data if data.endswith(b"\\n") else data + b"\\n"', resumed),
    "half a shard is taken": ("trace.shard_list", 'if set(shard.paths) != set(manifest["tables"]):', "if False:", resumed),
    "paths lead elsewhere": ("trace.schema", 'elif isinstance(value, str) and "pattern" in rule:', "elif False:", by("damage.test_an_impossible_line_is_refused_by_its_key", "a path that goes on elsewhere")),
    "numbers out of range are taken": ("trace.schema", 'if not rule["minimum"] <= value <= rule["maximum"]:', "if False:", by("damage.test_an_impossible_line_is_refused_by_its_key", "shard -1")),
    "keys of a router that there are not": ("trace.schema", 'elif rule.get("additionalProperties") is False:', "elif False:", by("damage.test_an_impossible_manifest_is_refused_by_its_key", "an unknown key")),
    "true is a number": ("trace.schema", "type(value) not in [TYPES[kind][0] for kind in kinds]:", "not isinstance(value, tuple(TYPES[kind][0] for kind in kinds)):", by("damage.test_an_impossible_manifest_is_refused_by_its_key", "a flag as top_k")),
    "paths of another rank": ("trace.shard_list", 'if not path.startswith(f"{table}/part-{rank}-"):', "if False:", by("damage.test_an_impossible_line_is_refused_by_its_key", "a path of rank 1")),
    "a digest is not looked at": ("trace.manifest", 'if "digest" in manifest and manifest["digest"]', 'if False and manifest["digest"]', by("damage.test_free_text_may_be_edited_and_nothing_else")),
    "any expert is taken": ("trace.shard", "for column in columns)) >= E:", "for column in columns)) > E:", by("damage.test_what_a_file_holds_is_checked", "expert 8 of 8")),
    "nulls are taken": ("trace.parts", "if column.null_count and not nulls and", "if False and", by("damage.test_what_a_file_holds_is_checked", "a null id")),
    "changed lines are taken": ("trace.shard_list", "not checksums.is_intact(line)", "False", by("verify.test_a_corruption_is_found_and_named", "a checksum gone")),
    "changed footers are taken": ("trace.parts", "elif stated.footer_crc32 is not None and", "elif False and", changed),
    "changed pages are taken": ("trace.parts", "read_dictionary=read_dictionary, page_checksum_verification=True, pre_buffer", "read_dictionary=read_dictionary, pre_buffer", changed),
    # importers
    "counts: a token too few": ("importers.batches", "-(-load_DE.sum(1) // router.top_k)", "load_DE.sum(1) // router.top_k", by("import_tables.test_tokens_are_as_many_as_explain_the_counts", [2, 1, 1, 1], 3)),
    "−1 is an expert": ("importers.routed", 'ids = ids_TK.astype(dtype, order="C")', 'ids = np.maximum(ids_TK, 0).astype(dtype, order="C")', by("routed.test_minus_one_is_nowhere", 8, np.uint8)),
    "vllm: one layer for all": ("importers.routed", "[routed_TBK[:, r.layer] for", "[routed_TBK[:, routers[0].layer] for", by_format("vllm-routed")),
    "vllm: dense layers route": ("importers.responses", "if dense := routed.dense_blocks(routed_TBK):", "if dense := []:", by("import.test_dense_layers_are_refused_without_a_config")),
    "vllm: what was generated was fed as a prompt": ("importers.responses", "cut = min(max(response.prompt - start, 0), T)", "cut = T", by("import.test_tokens_have_their_place", "vllm-routed")),
    "vllm: padding is tokens": ("importers.responses", "kept = routed_TBK[begin : rows - end]", "kept = routed_TBK[:expected]", by("import_responses.test_rows_of_padding_are_left_out", 2, [0])),
    "sglang: physical experts": ("importers.sglang", "map_BP[router.layer][physical_TK], -1)", "physical_TK % router.experts, -1)", by_format("sglang-per_token")),
    "sglang: physical counts": ("importers.sglang", "(B, P)), maps[path])", "(B, P)), np.arange(P)[None] % E)", by_format("sglang-per_pass")),
    "sglang: prompts of one token are decoded": ("importers.sglang", "length == 1 and one.mode != EXTEND and", "length == 1 and", by("import.test_prompts_of_one_token_in_an_sglang_pass")),
    "sglang: in mixed passes prompts of one token are decoded": ("importers.sglang", "(one.mode != MIXED or one.position[start] > 0)", "True", by("import.test_prompts_of_one_token_in_an_sglang_pass")),
    "sglang: a full ring is read as time": ("importers.sglang", "1 if wrapped else batches.WINDOWS", "batches.WINDOWS", by("import.test_a_full_ring_of_an_sglang_recorder_is_not_read_as_time", [0, 1, 2], 1)),
    "megatron: layers one too high": ("importers.megatron.layers", "from_one = [replace(f, offset=-1) for f in files]", "from_one = [replace(f, offset=0) for f in files]", by_format("megatron-pipeline")),
    "megatron: ranks by name": ("importers.megatron.layers", "== run), key=lambda f: f.rank)", "== run), key=lambda f: str(f.path))", by_format("megatron-pipeline")),
    "megatron: a pass of one token is a repetition": ("importers.megatron.importer", "(odd or len(first.ids_TK) > 1)", "True", by("import_megatron.test_passes_of_one_token_that_choose_alike_are_all_taken")),
    "megatron: one token of several ranks is taken once": ("importers.megatron.importer", " and T > 1:", ":", by("import_megatron.test_passes_of_one_token_that_choose_alike_are_all_taken")),
    "megatron: tensor-parallel ranks add up": ("importers.megatron.importer", "seen[source.domain, step].add(made)", "pass", by("import_megatron.test_tensor_parallel_ranks_are_taken_once_where_all_stages_agree")),
}  # fmt: skip


def test_unmutated_all_is_well(tmp_path: Path) -> None:
    """Two tests, as they are called here."""
    for n, check in enumerate((by_hand, older_in_order)):
        (tmp_path / str(n)).mkdir()
        check(tmp_path / str(n))


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_is_seen(name: str, tmp_path: Path) -> None:
    module, old, new, check = MUTATIONS[name]
    put = mutation(import_module(f"moe_inspect.{module}"), old, new)

    def mutated() -> None:
        put()
        check(tmp_path)

    assert fails(mutated)


def test_a_mutation_that_changes_nothing_is_refused() -> None:
    for old, new, said in (("no such line", "", "0 times"), ("return", "pass", "times in"), ("if likely > 0.01:", "if likely > 0.01:", "changes no function")):  # fmt: skip
        with pytest.raises(AssertionError, match=said):
            mutation(import_module("moe_inspect.reporting.verdict.experts"), old, new)
