"""The tests of counting, evidence, verdict, writer, reader and importers can fail: each mistake of
this list, put in on purpose, makes one of them do so. The kernels' and the ring's are in
test_mutations."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_inspect.analysis.counting import count_shard, kernels_numpy, router_counts, samples
from moe_inspect.analysis.metrics import balance, committee, pairs, paths, signature, uncertainty
from moe_inspect.analysis.metrics import chance as analysis_chance
from moe_inspect.analysis.weights import measure, stored
from moe_inspect.capture.corpus import plan as capture_plan
from moe_inspect.importers import batches, esft, responses, routed, sglang
from moe_inspect.importers.megatron import importer as megatron
from moe_inspect.importers.megatron import layers as megatron_layers
from moe_inspect.reporting.tables import pairs as pair_tables
from moe_inspect.reporting.verdict import balance as verdict
from moe_inspect.reporting.verdict import experts as verdict_experts
from moe_inspect.reporting.verdict import findings as verdict_chance
from moe_inspect.reporting.verdict import specialization as verdict_routing
from moe_inspect.trace import manifest, output_dir, parts, schema, shard, shard_list, slot_order
from moe_inspect.trace.files import atomic, lock
from moe_inspect.trace.writer import batches as writer_batches
from moe_inspect.trace.writer import tables, trace_writer
from tests import (
    test_aggregate,
    test_balance,
    test_chance,
    test_committee,
    test_counting,
    test_damage,
    test_describe_weights,
    test_evidence,
    test_generate,
    test_import,
    test_import_megatron,
    test_import_responses,
    test_output_dir,
    test_pairs,
    test_routed,
    test_slot_order,
    test_trace,
    test_trace_format,
    test_uncertainty,
    test_verdict_thresholds,
)
from tests.mutation import fails, mutation

pytestmark = pytest.mark.slow

Check = Callable[[Path], None]


def by(test: Callable[..., None], *arguments: Any) -> Check:
    """A test of another file, with its arguments but for the fixtures that are known here."""
    fixtures = {"tmp_path", "monkeypatch", "copied"}.intersection(
        named := inspect.signature(test).parameters
    )
    given = dict(zip((name for name in named if name not in fixtures), arguments, strict=True))

    def check(path: Path) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            made = {"tmp_path": path, "monkeypatch": monkeypatch}
            if "copied" in fixtures:
                made["copied"] = test_damage.a_sound_trace(path / "t")
            test(**given, **{name: made[name] for name in fixtures})

    return check


def by_sentence(case: str) -> Check:
    return by(test_verdict_thresholds.test_sentences, case)


def by_format(name: str) -> Check:
    return by(test_import.test_what_was_written_comes_back, name)


by_hand = by(test_aggregate.test_counts_are_those_of_counting_by_hand)
sums = by(test_counting.test_sums_that_must_hold)
merging = by(test_counting.test_merging_is_associative_and_commutative_and_leaves_the_parts_alone)
two_stacks = by(test_counting.test_an_encoder_and_a_decoder_have_tokens_of_their_own)
in_sequences = by(test_counting.test_repetition_and_segments_follow_a_sequence_across_batches)
logits = by(test_counting.test_what_logits_and_weights_say_by_hand)
written_in_order = by(test_slot_order.test_slots_are_written_in_descending_weight, "float16", 0.2)
older_in_order = by(test_slot_order.test_older_traces_with_weights_are_put_in_order_while_read, 0.2)
on_disk = by(test_trace.test_everything_is_on_disk_before_anything_speaks_of_it)
changed = by(test_damage.test_a_changed_footer_or_page_of_a_large_file_is_found)
resumed = by(test_trace.test_uncommitted_files_are_ignored_and_resume_deletes_them)

MUTATIONS = {
    # verdict
    "averaging: half becomes twice": (verdict, 'row["max_vio"] / 2)', 'row["max_vio"] * 2)', by_sentence("pooled shows half")),
    "least used: within chance": (verdict_experts, 'if row["least_used_p"] < ALPHA]', "]", by_sentence("little used by chance")),
    "dead: chance is taken for death": (verdict_experts, "if likely > 0.01:", "if likely > 0.5:", by_sentence("dead by chance")),
    "a domain overloads as all do": (verdict_experts, ' or excess <= 1.5 * overall["max_vio"]', "", by_sentence("little more than all together")),
    "passes: no floor": (verdict, ' - floor', "", by_sentence("by pass, as chance")),
    "uneven: by chance": (verdict_chance, 'return row["busiest_p"] < ALPHA', "return True", by(test_verdict_thresholds.test_balance, "within chance")),
    "signs: each router has its own": (analysis_chance, "random_signs(len(residual_UE))", "np.random.permutation(random_signs(len(residual_UE)))", by(test_chance.test_what_is_the_same_at_two_routers_is_one_case)),
    "specialised: by chance": (verdict_routing, 'table[table["domain_mi_p"] < ALPHA]', 'table[table["domain_mi_p"] <= 1]', by(test_verdict_thresholds.test_domains, "within chance")),
    # chance
    "whole passes are of one size": (balance, "2 * tokens_S >= tokens_S.max", "tokens_S == tokens_S.max", by(test_balance.test_by_hand_on_two_routers_of_four_experts)),
    "committee: ties for the last place are in": (committee, "(assignments_DE > after_D1)", "(assignments_DE >= after_D1)", by(test_committee.test_experts_that_share_the_last_place_are_left_out)),
    "committee: leads in one domain": (committee, "return leads_DE.all(-2)", "return leads_DE.any(-2)", by(test_committee.test_experts_that_share_the_last_place_are_left_out)),
    "committee: mass of all tokens together": (committee, "share_RD[known_R], axis=1", "0.98 * share_RD[known_R], axis=1", by(test_committee.test_an_expert_that_leads_everywhere_is_the_committee)),
    "signature: pairs are two cases": (signature, "S / (1 + mutual)", "S", by(test_committee.test_the_interval_of_the_accuracy_holds_what_other_documents_give)),
    "paths: a group is left out by halves": (paths, "np.sqrt((G - 1) / G *", "np.sqrt(1 / G *", by(test_committee.test_the_jackknife_leaves_out_one_group_of_documents_at_a_time)),
    "paths: groups split documents": (paths, "of_S.reshape(-1) % min(GROUPS, N)", "np.arange(len(document_S)) % min(GROUPS, N)", by(test_committee.test_the_jackknife_leaves_out_one_group_of_documents_at_a_time)),
    "samples: drawn by the place in a shard": (samples, "mixed(shard.files.first_token + seen.number_T)", "mixed(seen.number_T)", by(test_committee.test_a_sample_of_tokens_is_the_same_in_any_shards)),
    "weights: experts in reverse": (measure, "(t, e * (t.size // E)", "(t, (E - 1 - e) * (t.size // E)", by(test_describe_weights.test_every_family_is_found_and_measured, "gpt_oss")),
    "weights: the mean square, not its root": (measure, "/ np.sqrt(place.weights_E * square_E), np", "/ (place.weights_E * square_E), np", by(test_describe_weights.test_every_family_is_found_and_measured, "olmoe")),
    "weights: bf16 by half": (stored, "<< 16", "<< 15", by(test_describe_weights.test_bf16_fp16_and_several_files_in_pieces)),
    "design effect without n/(n − 1)": (uncertainty, ".sum()) * n / (n - 1)", ".sum())", by(test_uncertainty.test_the_design_effect_by_hand)),
    "Gaussian floor without E/(E − 1)": (uncertainty, "/ mean_load * E / (E - 1))", "/ mean_load)", by(test_uncertainty.test_the_gaussian_floor_by_hand)),
    "floor of independent picks": (uncertainty, "picks_J1 / (E - e)", "k / E + 0 * picks_J1", by(test_uncertainty.test_noise_floor_is_what_drawing_gives, 20, 16, 4)),
    "n of n documents are drawn": (uncertainty, "rng.multinomial(n - 1, np.full(n, 1 / n), size=R) * (n / (n - 1))", "rng.multinomial(n, np.full(n, 1 / n), size=R) * 1.0", by(test_uncertainty.test_resampling_keeps_the_variance_of_a_mean)),
    "a 90 % interval": (uncertainty, "[0.025, 0.5, 0.975]", "[0.05, 0.5, 0.95]", by(test_uncertainty.test_an_interval_leaves_out_a_fortieth_at_each_end)),
    # pairs
    "evidence: as if one pair were tested": (pair_tables, "np.log10(ALPHA / self.tested)", "np.log10(ALPHA)", by(test_evidence.test_one_pair_in_so_many_is_chance)),
    "evidence: one tail": (uncertainty, "(log_tail + np.log(2)) / np.log(10)", "log_tail / np.log(10)", by(test_evidence.test_tails_are_the_binomial_ones_far_out_too)),
    "evidence: repeated tokens count": (pair_tables, "effect = load.at_least_1(self.effect)", "effect = 1.0", by(test_evidence.test_one_pair_in_so_many_is_chance)),
    "pairs by chance: of independent choices": (pairs, "pair_EE *= np.outer(weight_E, weight_E)", "pair_EE[:] = 1", by(test_pairs.test_chance_is_exact_also_where_experts_are_in_nearly_all_decisions, 9, 3, 2.5, 1.0)),
    # counting
    "unknown first choices are counted": (router_counts, "first_DE if ranked else None, None", "first_DE, None", by(test_counting.test_what_hangs_on_a_first_choice_is_unknown_without_one)),
    "unknown first choices repeat": (router_counts, "first_same_U if of.router.first_choice_known else None", "first_same_U", by(test_counting.test_what_hangs_on_a_first_choice_is_unknown_without_one)),
    "unknown first choices lead on": (count_shard, "next_first_EN if ranked else None", "next_first_EN", by(test_counting.test_what_hangs_on_a_first_choice_is_unknown_without_one)),
    "unknown first choices of counts": (count_shard, "first_choice_DE if part.routers[r].first_choice_known else None", "first_choice_DE", by(test_slot_order.test_counts_recorded_before_the_order_was_stated_have_no_first_choices)),
    "first choices of the second slot": (kernels_numpy, "slots[:1], token_rows.D, E)", "slots[1:2], token_rows.D, E)", by_hand),
    "weights are of one domain": (router_counts, "self.kernels.weight_sum(rows.domain_T, self.slots", "self.kernels.weight_sum(rows.domain_T * 0, self.slots", by_hand),
    "weights of the first slot": (kernels_numpy, "np.concatenate(weights), size", "np.concatenate(weights[:1] * len(weights)), size", by_hand),
    "nowhere is an expert": (kernels_numpy, "return (row_T.astype(np.int64) * (E + 1) + np.stack(slots)).reshape(-1)", "return (row_T.astype(np.int64) * (E + 1) + np.minimum(np.stack(slots), E - 1)).reshape(-1)", by_hand),
    "what routed nowhere is not told": (router_counts, "of.router.top_k * len(of.slots[0]) - int(load_BE.sum())", "0 * int(load_BE.sum())", by_hand),
    "pairs over the edges of sequences": (kernels_numpy, "same_T = np.r_[False, (d[1:] == d[:-1]) & (s[1:] == s[:-1])]", "same_T = np.r_[False, d[1:] == d[:-1]]", in_sequences),
    "pairs over gaps": (kernels_numpy, "same_T & np.r_[False, p[1:] == p[:-1] + 1]", "same_T & np.r_[False, p[1:] > p[:-1]]", by(test_counting.test_tokens_that_do_not_follow_each_other_are_no_pair)),
    "tokens in the order of the trace": (kernels_numpy, "if not later_T.all():", "if False:", in_sequences),
    "segments a token longer": (kernels_numpy, "index_T - run_start_T >= m - 1", "index_T - run_start_T >= m", in_sequences),
    "pairs of slots: each with itself": (kernels_numpy, "slots[j:], E, E)", "slots[j - 1 :], E, E)", sums),
    "windows a token late": (count_shard, "windows.of(shard, seen.number_T) if windows", "windows.of(shard, seen.number_T + 1) if windows", by(test_counting.test_windows_by_hand)),
    "windows begin anew in every shard": (count_shard, "(self.before[shard.files.rank, shard.files.index] + number_T)", "(0 + number_T)", by(test_counting.test_windows_by_hand)),
    "ties: the rank before": (kernels_numpy, "ranked_TE[:, k - 1] - ranked_TE[:, k] if", "ranked_TE[:, k - 2] - ranked_TE[:, k - 1] if", logits),
    "merged: the last part alone": (router_counts, "mine[there] += theirs", "mine[there] = theirs", merging),
    "merged: passes of one part": (router_counts, "before + n, sum_before + vio", "n, vio", merging),
    "an encoder's tokens are the decoder's": (schema, '(stack == "encoder") == (phase == "encode")', '(stack == "encoder") != (phase == "encode")', two_stacks),
    # writer
    "slots stay as they came": (tables, "experts_KT = np.take_along_axis(experts_KT, order_KT, 0)", "pass", written_in_order),
    "weights stay where they were": (tables, "values_KT = np.take_along_axis(values_KT, order_KT, 0)", "pass", written_in_order),
    "nowhere comes first": (slot_order, "np.float32(-np.inf)", "np.float32(np.inf)", written_in_order),
    "equal weights are turned round": (slot_order, 'np.argsort(-key_KT, axis=0, kind="stable")', 'np.argsort(key_KT, axis=0, kind="stable")[::-1]', written_in_order),
    "in order as a whole, not each": (slot_order, "(key_KT[:-1] >= key_KT[1:]).all()", "(key_KT[:-1] >= key_KT[1:]).any()", by(test_slot_order.test_what_is_in_order_is_left_alone)),
    "resumed from a token twice": (trace_writer, "next_token=shards[-1].last_token + 1", "next_token=shards[-1].last_token", resumed),
    "resumed from a batch twice": (trace_writer, "next_batch=shards[-1].last_batch + 1", "next_batch=shards[-1].last_batch", resumed),
    "the next shard begins where this one does": (trace_writer, "self.next_token += tokens", "self.next_token += 0", by(test_trace.test_manifest_counts_and_lines_agree)),
    "a group is cut in two": (writer_batches, "if batch.group is not None and batch.group ==", "if False and batch.group ==", by(test_trace.test_a_group_is_committed_together_or_not_at_all, True)),
    "half a group is kept": (writer_batches, "if b.group != group]", "]", by(test_trace.test_a_group_is_committed_together_or_not_at_all, False)),
    "sequences are cut": (writer_batches, "return not continued or", "return True or", by(test_counting.test_a_generated_sequence_stays_in_one_shard, 20)),
    "directories are not synchronised": (trace_writer, "sync_directory(self.root / table)", "pass", on_disk),
    "nor is the manifest's": (atomic, "sync_directory(path.parent)", "pass", on_disk),
    "nor files": (atomic, "os.fsync(file) os.replace(draft, target)", "os.replace(draft, target)", on_disk),
    "nor lines": (atomic, "os.fsync(file.fileno()) except", "pass\n    except", on_disk),
    # what is in the way of a trace
    "files of others are removed": (output_dir, "if others or not is_trace:", "if not is_trace:", by(test_output_dir.test_what_is_no_trace_is_not_overwritten_and_named, "a file beside")),
    "what only has the name of a manifest is one": (output_dir, 'if not (isinstance(found, dict) and "format" in found):', "if False:", by(test_output_dir.test_what_is_no_trace_is_not_overwritten_and_named, "a profiler's over ours")),
    "links are followed and emptied": (output_dir, "entry.is_dir(follow_symlinks=False)", "entry.is_dir()", by(test_output_dir.test_what_is_no_trace_is_not_overwritten_and_named, "a table elsewhere")),
    "the manifest goes last": (output_dir, "if schema.MANIFEST in there.files:\n            _withdraw_manifest", "if False:\n            _withdraw_manifest", by(test_output_dir.test_the_manifest_goes_first_and_whoever_comes_next_goes_on)),
    "a lock that another holds": (lock, "(got and is_at(file, root / LOCK))", "is_at(file, root / LOCK)", by(test_output_dir.test_ranks_share_a_lock_and_any_of_them_keeps_another_job_out)),
    "a lock of another holder is joined": (lock, "if _holder_in(file) != holder:", "if False:", by(test_output_dir.test_ranks_share_a_lock_and_any_of_them_keeps_another_job_out)),
    "generated tokens take no room": (capture_plan, "(len(row.ids) + generate * row.continued) > batch_tokens", "len(row.ids) > batch_tokens", by(test_generate.test_the_plan)),
    # reader
    "older traces are not put in order": (shard, "if not slots or (", "if True or (", older_in_order),
    "a torn line is taken": (shard_list, 'data[: data.rfind(b"\\n") + 1]', 'data if data.endswith(b"\\n") else data + b"\\n"', resumed),
    "half a shard is taken": (shard_list, 'if set(shard.paths) != set(manifest["tables"]):', "if False:", resumed),
    "paths lead elsewhere": (schema, 'elif isinstance(value, str) and "pattern" in rule:', "elif False:", by(test_damage.test_an_impossible_line_is_refused_by_its_key, "a path that goes on elsewhere")),
    "numbers out of range are taken": (schema, 'if not rule["minimum"] <= value <= rule["maximum"]:', "if False:", by(test_damage.test_an_impossible_line_is_refused_by_its_key, "shard -1")),
    "keys of a router that there are not": (schema, 'elif rule.get("additionalProperties") is False:', "elif False:", by(test_damage.test_an_impossible_manifest_is_refused_by_its_key, "an unknown key")),
    "true is a number": (schema, "type(value) not in [TYPES[kind][0] for kind in kinds]:", "not isinstance(value, tuple(TYPES[kind][0] for kind in kinds)):", by(test_trace_format.test_a_value_that_looks_like_another_is_refused, "trace_json", ("routers", 0, "top_k"), True)),
    "paths of another rank": (shard_list, 'if not path.startswith(f"{table}/part-{rank}-"):', "if False:", by(test_damage.test_an_impossible_line_is_refused_by_its_key, "a path of another rank")),
    "a digest is not looked at": (manifest, 'if "digest" in manifest and manifest["digest"]', 'if False and manifest["digest"]', by(test_damage.test_free_text_may_be_edited_and_nothing_else)),
    "any expert is taken": (shard, "for column in columns)) >= E:", "for column in columns)) > E:", by(test_damage.test_what_a_file_holds_is_checked, "an expert that there is not")),
    "nulls are taken": (parts, "if column.null_count and not nulls and", "if False and", by(test_damage.test_what_a_file_holds_is_checked, "a null id")),
    "changed lines are taken": (shard_list, "not checksums.is_intact(line)", "False", by(test_damage.test_a_line_changed_to_another_that_is_possible_is_found)),
    "changed footers are taken": (parts, "elif stated.footer_crc32 is not None and", "elif False and", changed),
    "changed pages are taken": (parts, "read_dictionary=read_dictionary, page_checksum_verification=True, pre_buffer", "read_dictionary=read_dictionary, pre_buffer", changed),
    # importers
    "counts: a token too few": (batches, "-(-load_DE.sum(1) // router.top_k)", "load_DE.sum(1) // router.top_k", by(test_import.test_counts_are_of_as_many_tokens_as_the_fullest_router_needs, 5, 3)),
    "−1 is an expert": (routed, 'ids = ids_TK.astype(dtype, order="C")', 'ids = np.maximum(ids_TK, 0).astype(dtype, order="C")', by(test_routed.test_minus_one_is_nowhere, 8, np.uint8)),
    "vllm: the layer before": (routed, "checked_ids(routed_TBK[:, r.layer], r,", "checked_ids(routed_TBK[:, r.layer - 1], r,", by(test_routed.test_a_router_gets_its_block_and_what_is_no_decision_is_refused)),
    "vllm: dense layers route": (responses, "if dense := routed.dense_blocks(routed_TBK):", "if dense := []:", by(test_import.test_dense_layers_are_refused_without_a_config)),
    "vllm: what was generated was fed as a prompt": (responses, "cut = min(max(response.prompt - start, 0), T)", "cut = T", by(test_import.test_positions_phases_and_documents_of_responses)),
    "vllm: padding is tokens": (responses, "kept = routed_TBK[begin : rows - end]", "kept = routed_TBK[:expected]", by(test_import_responses.test_padding_on_both_sides_is_left_out)),
    "sglang: physical experts": (sglang, "map_BP[router.layer][physical_TK], -1)", "physical_TK % router.experts, -1)", by_format("sglang-per_token")),
    "sglang: physical counts": (sglang, "(B, P)), maps[path])", "(B, P)), np.arange(P)[None] % E)", by_format("sglang-per_pass")),
    "sglang: prompts of one token are decoded": (sglang, "return mode != EXTEND and length == 1 and", "return length == 1 and", by(test_import.test_prompts_of_one_token_in_an_sglang_pass)),
    "sglang: in mixed passes prompts of one token are decoded": (sglang, "(mode != MIXED or self.position[start] > 0)", "True", by(test_import.test_prompts_of_one_token_in_an_sglang_pass)),
    "sglang: a full ring is read as time": (sglang, "1 if wrapped else batches.WINDOWS", "batches.WINDOWS", by(test_import.test_a_full_ring_of_an_sglang_recorder_is_not_read_as_time, [0, 1, 2], 1)),
    "megatron: layers one too high": (megatron_layers, "from_one = [replace(f, offset=-1) for f in files]", "from_one = [replace(f, offset=0) for f in files]", by_format("megatron-pipeline")),
    "megatron: ranks by name": (megatron_layers, "sorted(files, key=lambda f: f.rank)", "sorted(files, key=lambda f: str(f.path))", by_format("megatron-pipeline")),
    "megatron: a pass of one token is a repetition": (megatron, "(odd or len(first.ids_TK) > 1)", "True", by(test_import_megatron.test_passes_of_one_token_that_choose_alike_are_all_taken)),
    "megatron: one token of several ranks is taken once": (megatron, " and T > 1:", ":", by(test_import_megatron.test_passes_of_one_token_that_choose_alike_are_all_taken)),
    "megatron: tensor-parallel ranks add up": (megatron, "seen[source.domain, step].add(made)", "pass", by(test_import_megatron.test_tensor_parallel_ranks_are_taken_once_where_all_stages_agree)),
    "esft: weights of another token": (esft, "weights=[w[part] for w in weights]", "weights=[w[:T] for w in weights]", by_format("esft")),
    "esft: weights are even": (esft, "rounded_N.reshape(-1, k), tokens", "(0 * rounded_N + 0.25).reshape(-1, k), tokens", by_format("esft")),
}  # fmt: skip


def test_unmutated_all_is_well(tmp_path: Path) -> None:
    for n, check in enumerate(dict.fromkeys(check for *_, check in MUTATIONS.values())):
        (tmp_path / str(n)).mkdir()
        check(tmp_path / str(n))


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_is_seen(name: str, tmp_path: Path) -> None:
    module, old, new, check = MUTATIONS[name]
    put = mutation(module, old, new)

    def mutated() -> None:
        put()
        check(tmp_path)

    assert fails(mutated)


def test_a_mutation_that_changes_nothing_is_refused() -> None:
    for old, new, said in (("no such line", "", "0 times"), ("return", "pass", "times in"), ("if likely > 0.01:", "if likely > 0.01:", "changes no function")):  # fmt: skip
        with pytest.raises(AssertionError, match=said):
            mutation(verdict_experts, old, new)
