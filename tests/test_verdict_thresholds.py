"""Each sentence of the verdict and of the simulations, and the words that it turns on, just under and just over every threshold: on tables
by hand."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.reporting.verdict import balance, data_checks, experts, specialization
from moe_inspect.simulate import cache as cache_text
from moe_inspect.simulate import capacity as capacity_text
from moe_inspect.simulate import decode as decode_text
from moe_inspect.simulate import routing as routing_text
from moe_inspect.simulate.routing import simulate_routing
from tests.conftest import ROOT
from tests.support.stub import row, stub

EVEN = [100] * 8
# a document chooses one expert only
ONE_EXPERT_EACH_UE = np.eye(8, dtype=int)[np.arange(60) % 8] * 50


def load(busiest: float, E: int = 8, mean: int = 1_000) -> list[int]:
    """Expert 0 has `busiest` times the mean load, the others alike."""
    rest = mean * (E - busiest) / (E - 1)
    return [round(busiest * mean), *[round(rest)] * (E - 1)]


def near(busiest: float, **columns: Any) -> dict[str, Any]:
    """A router whose max_vio is exactly that."""
    usual = {"max_vio": round(busiest - 1, 9), "max_over_mean": busiest}
    return row(load(busiest), **{**usual, "max_over_mean_low": busiest - 0.01, **columns})


def dying(tokens: int, **columns: Any) -> dict[str, Any]:
    """Eight experts of which the last is dead; each picked by a quarter of the tokens."""
    return row([tokens * 2 // 7] * 7 + [0], k=2, tokens=tokens, assignments=tokens * 2, **columns)


# 8 · (3/4)^T is 0.0101 at 23.2 tokens
LEAST_FOR_DEAD = math.ceil(math.log(0.01 / 8) / math.log(0.75))


def crowd(*ratios: float, **columns: Any) -> dict[str, Any]:
    """A router of eight experts, the first with these load ratios."""
    rest = (8 - sum(ratios)) / (8 - len(ratios))
    return row([round(100_000 * r) for r in (*ratios, *[rest] * (8 - len(ratios)))], **columns)


def of_domains(
    busiest: float, together: float, tokens: int = 80_000, chance: float = 0.001, **given: Any
) -> Any:
    """Two domains of so many tokens; expert 0 has `busiest` times the mean in the first, expert 1 evens it out in the second; in both
    together max_over_mean is `together`."""
    first, second = np.array(load(busiest, mean=tokens // 8)), np.full(8, tokens // 8)
    known = {"max_over_mean": together, "max_vio": together - 1, "expected_by_chance": 1 + chance}
    of = row(first + second, **known)
    return stub(of, domains=("code", "law"), by_domain=[np.array([first, second])], **given)


def ties(
    rate: float, limit: float = 0.01, tables: tuple[str, ...] = ("logits",), documents: int = 60
) -> Any:
    rows = [{"layer": r, "router": r, "tie_rate": value} for r, value in ((0, 0.0), (1, rate))]
    made = stub(row(EVEN), row(EVEN), router=rows, limits={"tie": limit}, documents=documents)
    made.trace.tables = tables
    return made


def of_tokens(uneven: float) -> Any:
    return stub(row([100] * 8, tokens=800), limits={"uneven": uneven})


def of_documents(*documents: int, **given: Any) -> Any:
    domains = ("code", "law")[: len(documents)]
    return stub(row(EVEN), domains=domains, documents=documents, **given)


def ranks(*dead: int) -> Any:
    """A router each, of 8 experts; so many of them are dead, the upper half among them."""
    return stub(*(row([1 + e if e < 8 - n else 0 for e in range(8)]) for n in dead))


def least_of(code: list[int], **given: Any) -> Any:
    """Expert 0 is used at 0.3x; the busiest gets 3.67x its load. Of the domains, code has these loads."""
    of = crowd(0.3, expected_by_chance=1 + given.pop("chance", 0.01))
    loads = [[code, [300] + [1_100] * 7]]
    return stub(of, domains=("code", "law"), by_domain=loads, **given)


def deserted(expert: int, mean: int = 10_000, others: int = 10_000, **given: Any) -> Any:
    """Expert 0 has so many assignments in "code", and `others` in "law"; the others are even."""
    code = np.array([expert, *[(8 * mean - expert) // 7] * 7])
    law = np.array([others, *[10_000] * 7])
    given = {"domains": ("code", "law"), "by_domain": [[code, law]], "counts_only": True, **given}
    return stub(row(code + law), **given)


def twice(few: list[int]) -> Any:
    """Two domains, of three, in which the first experts have so many assignments."""
    code, chat = np.array([*few, *[1_000] * 6]), np.array([3_000, 3_000, *[1_000] * 6])
    given = {"domains": ("code", "law", "chat"), "by_domain": [[code * 50, code * 50, chat * 50]]}
    return stub(row((2 * code + chat) * 50), counts_only=True, **given)


def information(**columns: Any) -> dict[str, Any]:
    """A row of that table: 0.5 bits beyond a null of 0.1, whose 99th percentile is 0.12."""
    known = {"domain_mi_bits": 0.6, "domain_mi_null_bits": 0.1, "domain_mi_null_p99_bits": 0.12}
    known |= {"domain_mi_given_token_bits": 0.5, "domain_mi_given_token_null_bits": 0.1}
    known |= {"domain_mi_given_token_p": 0.002, "domain_mi_p": 0.002}
    known |= {"token_mi_bits": 1.0, "token_mi_null_bits": 0.5, "vocabulary_specialization": 0.5}
    known |= {"vocabulary_specialization_null": 0.3, "vocabulary_specialization_p": 0.002}
    return {"layer": 0, "router": 0, **known, **columns}


def ids(**columns: Any) -> Any:
    word = {"router": 0, "expert": 3, "token": " the", "first_choice_fraction": 0.9}
    word |= {"count": 90, "occurrences": 100}
    return stub(row(EVEN), specialization=[information(**columns)], vocabulary=[word])


FLOOR = unc.noise_floor(800, 8, 1)
NEVER = ' times as much (on "code", expert 0 is never chosen).'
SPOKEN = {
    "nothing": (balance.balance, stub(row([0] * 8)), "No router made any assignments: there is no load to judge."),
    "uneven": (balance.balance, stub(near(1.2)), "Layer 0 is uneven (at least 1.2x and beyond chance): expert 0 gets 1.20x the mean load"),
    "not uneven": (balance.balance, stub(near(1.1999)), "Balanced: at worst, in layer 0, expert 0 gets 1.20x"),
    "uneven, by its threshold": (balance.balance, stub(near(1.31), limits={"uneven": 0.31}), "Layer 0 is uneven (at least 1.31x"),
    "not uneven, by its threshold": (balance.balance, stub(near(1.31), limits={"uneven": 0.32}), "Balanced"),
    "the worst of two": (balance.balance, stub(row(EVEN), near(1.2)), "Layer 1 is the worst balanced: expert 0 gets 1.20x"),
    "one of two": (balance.balance, stub(row(EVEN), near(1.2)), ". 1 of 2 routers is uneven (at least 1.2x and beyond chance)."),
    "both": (balance.balance, stub(near(1.3), near(1.2)), ". 2 of 2 routers are uneven"),
    "one of two, just": (balance.balance, stub(near(1.3), near(1.1999)), ". 1 of 2 routers is uneven"),
    "beyond chance": (balance.balance, stub(near(1.1, busiest_p=0.0099)), "Balanced: at worst"),
    "within chance": (balance.balance, stub(near(1.1, busiest_p=0.01)), "which chance explains ("),
    "not known": (balance.balance, stub(near(1.1, busiest_p=math.nan)), "which chance explains ("),
    "counts, beyond any documents": (balance.balance, stub(near(1.4, expected_by_chance=1 + 0.4 / 31.63), counts_only=True), "Layer 0 is uneven"),
    "counts, as long documents": (balance.balance, stub(near(1.4, expected_by_chance=1 + 0.4 / 31.62), counts_only=True), "Counts alone cannot tell whether the load is even: at worst, in layer 0"),
    "at the ceiling": (balance.balance, stub(row([500] + [0] * 7)), "expert 0 gets 8.00x the mean load (every token goes to it; expected"),
    "a token short of it": (balance.balance, stub(row([499, 1] + [0] * 6)), "(95% interval 7.97-"),
    "k of k experts are no ceiling": (balance.balance, stub(row([50, 50], k=2)), "95% interval"),
    "chance reaches uneven": (balance.balance, stub(near(1.19, expected_by_chance=1.2, busiest_p=0.5)), "Too little data to judge balance: at worst"),
    "chance does not": (balance.balance, stub(near(1.19, expected_by_chance=1.1999, busiest_p=0.5)), "which chance explains ("),
    "even or chance": (balance.balance, stub(near(1.1999, busiest_p=0.5)), "which chance explains ("),
    "the others are known": (balance.balance, stub(near(1.4, busiest_p=0.5, max_over_mean_low=1.001), near(1.3)), "which may be chance (95% interval 1.00-1.41x; expected by chance: 1.01x); 1 of 2 routers is uneven"),
    "few documents": (balance.balance, stub(near(1.3), documents=7), "Too little data to judge balance: at worst, in layer 0, expert 0 gets 1.30x"),
    "documents enough": (balance.balance, stub(near(1.3), documents=8), "Layer 0 is uneven"),
    "counts know no documents": (balance.balance, stub(near(1.4), documents=4, counts_only=True), "Layer 0 is uneven"),
    "counts, with the design effect assumed": (balance.balance, stub(near(1.4, max_over_mean_low=math.nan), counts_only=True), "at least 1.2x and beyond chance even if 1,000 tokens choose as one): expert 0 gets 1.40x the mean load (no interval from counts alone; expected by chance of independent tokens: 1.01x)."),
    "counts, with the one that would explain it": (balance.balance, stub(near(1.15, expected_by_chance=1.0099), counts_only=True), "expert 0 gets 1.15x the mean load, which chance explains if 230 tokens choose as one ("),
    "dead, within chance": (balance.balance, stub(near(1.1, dead_experts=1, busiest_p=0.5)), "No expert is overloaded: at worst"),
    # a router without load
    "silent": (balance.routers_without_load, stub(row([0] * 8), row(EVEN)), "1 of 2 routers made no assignments: layer 0."),
    "none silent": (balance.routers_without_load, stub(row([1] + [0] * 7), row(EVEN)), None),
    "all silent": (balance.routers_without_load, stub(row([0] * 8), row([0] * 8)), None),
    # dead experts
    "no dead": (experts.dead_experts, stub(row([1, *EVEN[1:]])), None),
    "dead": (experts.dead_experts, stub(dying(LEAST_FOR_DEAD)), f"1 dead expert in 1 of 1 routers (layer 0: 7): none of {LEAST_FOR_DEAD} tokens was routed there."),
    "dead by chance": (experts.dead_experts, stub(dying(LEAST_FOR_DEAD - 1)), "tokens are too few to call an expert dead: chance alone leaves some"),
    "dead, alike within documents": (experts.dead_experts, stub(dying((LEAST_FOR_DEAD - 1) * 5, design_effect=5.0)), "tokens are too few to call an expert dead"),
    "dead, many alike": (experts.dead_experts, stub(dying(LEAST_FOR_DEAD * 5, design_effect=5.0)), "1 dead expert in 1 of 1 routers"),
    "dead, counts": (experts.dead_experts, stub(dying((LEAST_FOR_DEAD - 1) * 1_000), counts_only=True), "tokens are too few to call an expert dead"),
    "dead, many counts": (experts.dead_experts, stub(dying(LEAST_FOR_DEAD * 1_000), counts_only=True), "1 dead expert in 1 of 1 routers"),
    "dead, few documents": (experts.dead_experts, stub(dying(LEAST_FOR_DEAD), documents=7), "but with fewer than 8 documents this may be the text"),
    "dead, documents enough": (experts.dead_experts, stub(dying(LEAST_FOR_DEAD), documents=8), f"none of {LEAST_FOR_DEAD} tokens was routed there."),
    "dead in two": (experts.dead_experts, stub(dying(90), dying(90), row(EVEN)), "2 dead experts in 2 of 3 routers (layer 0: 7; layer 1: 7)"),
    # crowded and starved ones
    "overloaded": (experts.overloaded_experts, stub(crowd(2.0)), "1 expert in 1 router gets at least 2x the mean load."),
    "not overloaded": (experts.overloaded_experts, stub(crowd(1.9999)), None),
    "overloaded, by its threshold": (experts.overloaded_experts, stub(crowd(1.5), limits={"overloaded": 1.5}), "gets at least 1.5x the mean load."),
    "starved": (experts.starved_experts, stub(crowd(0.0999)), "1 expert in 1 router gets under 10% of the mean load."),
    "not starved": (experts.starved_experts, stub(crowd(0.1)), None),
    "dead is not starved": (experts.starved_experts, stub(crowd(0.0)), None),
    "one of them starved": (experts.starved_experts, stub(crowd(2.5, 2.5, 0.01)), "1 expert in 1 router gets under 10% of the mean load."),
    "overloaded by chance": (experts.overloaded_experts, stub(crowd(2.0, busiest_p=0.01)), None),
    "overloaded beyond chance": (experts.overloaded_experts, stub(crowd(2.0, busiest_p=0.0099)), "gets at least 2x"),
    # the least used
    "little used": (experts.least_used_expert, stub(crowd(0.4999)), "Expert 0 of layer 0 is the least used: 0.50x the mean load. That layer's busiest expert gets 2.1 times as much."),
    "used enough": (experts.least_used_expert, stub(crowd(0.5001)), None),
    "little used by chance": (experts.least_used_expert, stub(crowd(0.1, least_used_p=0.01)), None),
    "little used beyond chance": (experts.least_used_expert, stub(crowd(0.4, least_used_p=0.0099)), "0.40x the mean"),
    "starved by chance": (experts.starved_experts, stub(crowd(0.05, least_used_p=0.01)), None),
    "counts, little used": (experts.least_used_expert, stub(crowd(0.3, expected_by_chance=1.023), counts_only=True), None),
    "counts, hardly used": (experts.least_used_expert, stub(crowd(0.3, expected_by_chance=1.022), counts_only=True), "0.30x the mean"),
    "of all routers the least": (experts.least_used_expert, stub(crowd(0.3), crowd(0.2), crowd(0.4)), "Expert 0 of layer 1 is the least used: 0.20x"),
    "the least of the living": (experts.least_used_expert, stub(crowd(0.3), crowd(0.0, 0.0004), crowd(0.0, 0.2)), "Expert 1 of layer 1 is the least used of those with any load: 0.0004x the mean load. That layer's busiest expert gets 3,3"),
    # what waiting costs
    "waiting": (balance.busiest_gpu, stub(near(1.2)), "the busiest GPU of a layer gets 1.20x the mean load. What"),
    "not waiting": (balance.busiest_gpu, stub(near(1.1999)), None),
    # passes
    "by pass": (balance.uneven_batches, stub(near(1.05, max_vio_batch=0.2)), "most in layer 0: the busiest expert of a pass gets 1.20x the mean load on average"),
    "even by pass": (balance.uneven_batches, stub(near(1.05, max_vio_batch=0.1999)), None),
    "by pass, few documents in each": (balance.uneven_batches, stub(near(1.05, max_vio_batch=0.9, noise_floor_batch=0.5, design_effect=9.0, load_UE=ONE_EXPERT_EACH_UE)), "tokens of one document choose alike (design effect 9.0)"),
    "by pass, documents too few": (balance.uneven_batches, stub(near(1.05, max_vio_batch=0.9, noise_floor_batch=0.5, design_effect=math.nan)), "Whether its documents explain this is unknown"),
    "by pass, as chance": (balance.uneven_batches, stub(near(1.05, max_vio_batch=0.9, noise_floor_batch=0.8)), None),
    "by pass, beyond chance": (balance.uneven_batches, stub(near(1.05, max_vio_batch=0.9, noise_floor_batch=0.5)), "of a pass gets 1.90x"),
    "a single pass": (balance.uneven_batches, stub(near(1.05, max_vio_batch=0.5, passes={100: (1, 0.5)})), None),
    "one whole pass": (balance.uneven_batches, stub(near(1.05, max_vio_batch=0.5, passes={100: (1, 0.5), 49: (9, 3.0)})), None),
    "two whole passes": (balance.uneven_batches, stub(near(1.05, max_vio_batch=0.5, passes={100: (1, 0.5), 50: (1, 0.5)})), "of a pass gets 1.50x the mean load on average (expected"),
    "larger passes": (balance.uneven_batches, stub(near(1.05, max_vio_batch=0.5, passes={100: (19, 0.5), 1: (152, 0.5)})), "(of 19 of 171 passes, the larger ones; expected by chance"),
    # pooling
    "pooled hides": (balance.averaging_hides, stub(near(1.3), row(EVEN), pooled=1.15), "The load summed over layers by expert number looks even (its busiest expert number gets 1.15x the mean) and hides layer 0."),
    "pooled shows half": (balance.averaging_hides, stub(near(1.3), row(EVEN), pooled=1.1501), None),
    "pooled hides up to uneven": (balance.averaging_hides, stub(near(1.9), row(EVEN), pooled=1.2), "gets 1.20x the mean)"),
    "pooled is uneven": (balance.averaging_hides, stub(near(1.9), row(EVEN), pooled=1.2001), None),
    "nothing to hide": (balance.averaging_hides, stub(near(1.1999), row(EVEN), pooled=1.0), None),
    "no pooled figure": (balance.averaging_hides, stub(near(1.9)), None),
    # a domain that overloads
    "overloads": (experts.overloading_domain, of_domains(1.2, 1.01), '"code" overloads expert 0 of layer 0: 1.20x the mean load on its 79,998 tokens; all domains'),
    "does not overload": (experts.overloading_domain, of_domains(1.1998, 1.01), None),
    "more than all together": (experts.overloading_domain, of_domains(1.6, 1.3999), '"code" overloads expert 0'),
    "little more than all together": (experts.overloading_domain, of_domains(1.6, 1.4), None),
    "one domain": (experts.overloading_domain, stub(row(load(1.6))), None),
    "overloads, documents enough": (experts.overloading_domain, of_domains(1.6, 1.1, documents=(5, 60)), '"code" overloads expert 0'),
    "overloads, few documents": (experts.overloading_domain, of_domains(1.6, 1.1, documents=(4, 60)), "may be their text, not the domain."),
    "overloads, counts": (experts.overloading_domain, of_domains(1.6, 1.1, documents=(4, 60), counts_only=True), '"code" overloads expert 0'),
    # documents whose design effect is (0.5 ÷ the floor)² explain 1.5 times the mean: over 1,000 where the floor is 0.0158
    "overloads, counts beyond any documents": (experts.overloading_domain, of_domains(1.5, 1.01, tokens=100_000, counts_only=True), '"code" overloads'),
    "overloads, counts as long documents": (experts.overloading_domain, of_domains(1.5, 1.01, tokens=20_000, counts_only=True), None),
    "overloads beyond chance": (experts.overloading_domain, of_domains(1.6, 1.1, overload_p=0.0099), '"code" overloads expert 0'),
    "overloads within chance": (experts.overloading_domain, of_domains(1.6, 1.1, overload_p=0.01), None),
    "overloads, not known": (experts.overloading_domain, of_domains(1.6, 1.1, overload_p=math.nan), None),
    # the logits
    "ties": (specialization.router_ties, ties(0.01), "In 1.0% of the decisions of layer 1 the last expert chosen and the first not chosen have equal logits (1 router with 1.0% or more)"),
    "few ties": (specialization.router_ties, ties(0.0099), None),
    "ties, by their threshold": (specialization.router_ties, ties(0.0099, 0.005), "In 1.0% of the decisions of layer 1 the last"),
    "no logits": (specialization.router_ties, ties(0.01, tables=("routing",)), None),
    # is there enough
    "few tokens": (data_checks.few_tokens, of_tokens(FLOOR - 1e-3), f"800 tokens are few for 8 experts: by chance alone the busiest gets {1 + FLOOR:.2f}x the mean load. About 810 tokens would"),
    "tokens enough": (data_checks.few_tokens, of_tokens(FLOOR + 1e-3), None),
    "no threshold for tokens": (data_checks.few_tokens, of_tokens(0), None),
    "a domain of few documents": (data_checks.few_documents_per_domain, of_documents(4, 5), 'Domains of fewer than 5 documents reflect single texts as much as the domain: "code" (4).'),
    "domains of documents enough": (data_checks.few_documents_per_domain, of_documents(5, 5), None),
    "a single domain": (data_checks.few_documents_per_domain, of_documents(4), None),
    "documents of counts": (data_checks.few_documents_per_domain, of_documents(4, 5, counts_only=True), None),
    # two halves, two ways round: 4 / 70 for one router, 4 / 70² = 0.0008 for two, 4 / (70 · 14) where one has a dead expert more
    "a rank is missing": (data_checks.missing_ranks, ranks(4, 4), "Experts 4-7 of 8 have no load, in every router: these look like the counts of 1 of 2 ranks"),
    "a rank, or dead experts": (data_checks.missing_ranks, ranks(4, 5), None),
    "a rank, or one router": (data_checks.missing_ranks, ranks(4), None),
    "a rank, or fewer": (data_checks.missing_ranks, ranks(4, 4, 3), None),
    # the domain where the least used is used least
    "half as much again": (experts.least_used_expert, least_of([200] + [1_101] * 7), "Expert 0 of layer 0 is the least used: 0.30x the mean load. That layer's busiest expert gets 3.7 times as much (5.5 times on \"code\")."),
    "not half as much again": (experts.least_used_expert, least_of([200] + [1_099] * 7), "gets 3.7 times as much."),
    "never": (experts.least_used_expert, least_of([0] + [1_200] * 7), NEVER),
    "load enough": (experts.least_used_expert, least_of([0] + [114] * 6 + [116]), NEVER),
    "too little load": (experts.least_used_expert, least_of([0] + [114] * 6 + [115]), " times as much."),
    "never, documents enough": (experts.least_used_expert, least_of([0] + [1_200] * 7, documents=(5, 60)), NEVER),
    "never, few documents": (experts.least_used_expert, least_of([0] + [1_200] * 7, documents=(4, 60)), " times as much."),
    "never, counts": (experts.least_used_expert, least_of([0] + [1_200] * 7, documents=(4, 60), counts_only=True, chance=0.001), NEVER),
    # a domain that deserts an expert
    "deserts": (experts.unused_in_domain, deserted(990), '"code" leaves expert 0 of layer 0 nearly unused: 0.10x the mean load on its 7'),
    "deserts too little": (experts.unused_in_domain, deserted(1_010), None),
    "deserts, of documents `domains` says more": (experts.unused_in_domain, deserted(990, counts_only=False), None),
    "deserts, one expert twice": (experts.unused_in_domain, twice([10, 1_000]), " times as much."),
    "deserts, two experts twice": (experts.unused_in_domain, twice([10, 20]), " times as much; so is 1 other expert in some domain."),
    "deserts, by its threshold": (experts.unused_in_domain, deserted(990, limits={"starved": 0.09}), None),
    "deserts, the others do not": (experts.unused_in_domain, deserted(50, others=2_500), " times as much."),
    "starved everywhere": (experts.unused_in_domain, deserted(50, others=1_800), None),
    # documents with a design effect of 1,000 explain none where chance gives 1.032x
    "deserts beyond chance": (experts.unused_in_domain, deserted(0, mean=2_200), '"code" leaves'),
    "deserts within chance": (experts.unused_in_domain, deserted(0, mean=1_800), None),
    "deserts, of one domain": (experts.unused_in_domain, stub(row([10] + [1_000] * 7), counts_only=True), None),
    # token ids
    "token ids": (specialization.token_specialization, ids(vocabulary_specialization=0.32), "The token id determines the expert most in layer 0: 32% of first choices are the favourite expert of their token id (30% with the ids shuffled); 90% of the 100 occurrences of ' the' go to expert 3 first."),
    "no token ids": (specialization.token_specialization, ids(vocabulary_specialization=0.3199), "The token id does not determine the expert: tokens of one id spread over the experts as shuffled ids would."),
    "token ids, few": (specialization.token_specialization, ids(vocabulary_specialization_p=0.01), "Too little data to tell whether the token id determines the expert"),
    "token ids, enough": (specialization.token_specialization, ids(vocabulary_specialization_p=0.0099), "The token id determines"),
    "a single token id": (specialization.token_specialization, ids(token_mi_null_bits=0.0), None),
    "token ids, not known": (specialization.token_specialization, ids(vocabulary_specialization=math.nan), None),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOKEN)
def test_sentences(case: str):
    function, made, says = SPOKEN[case]
    found = function(made)
    assert (found is None) if says is None else (found is not None and says in found.text), found


def test_ties_of_few_documents_are_no_warning():
    severities = [specialization.router_ties(ties(0.01, documents=n)).severity for n in (7, 8)]
    assert severities == ["note", "warning"]


def told(
    *rows: dict[str, Any], documents: Any = (30, 30), seed: int | None = None, **given: Any
) -> str:
    D, balance = len(documents), [row([400, *[200] * 7])] * len(rows)
    given |= {"specialization": [{**of, "layer": r, "router": r} for r, of in enumerate(rows)]}
    given |= {"by_domain": [np.array([[300, *EVEN[1:]], EVEN])[:D]] * len(rows)}
    made = stub(*balance, domains=("code", "law")[:D], documents=documents, **given)
    if seed is not None:
        made.trace.manifest = {"corpus": {"plan": {"random_init": seed}}}
    return " ".join(found.text for check in DOMAIN_CHECKS if (found := check(made)) is not None)


def beyond(bits: float, null: float = 0.1, p99: float = 0.12, **columns: Any) -> dict[str, Any]:
    return information(
        domain_mi_bits=bits, domain_mi_null_bits=null, domain_mi_null_p99_bits=p99, **columns
    )


LABELS = {0: "0", 1: "1/1", 2: "1/2"}


def routed(*advice: tuple[str, float, float, float]) -> str:
    """advice: (algorithm, experts per token, worst max_vio, least mass kept) of others."""
    rows: list[dict[str, Any]] = [{"router": 1, "algorithm": "as recorded", "max_vio": 1.0}]
    rows.append({"router": 0, "algorithm": "as recorded", "max_vio": 0.5})
    names = ["algorithm", "experts_per_token", "max_vio_worst", "mass_retained_least"]
    told = pd.DataFrame(advice or [("top-k 2", 2, 1.0, 1.0)], columns=names)
    told["leaks_future"] = np.where(told["algorithm"] == "expert choice", "yes", "no")
    settings = {"uneven": 0.2, "experts_per_token": 2.0, "too_few": False}
    tables = {"routing": pd.DataFrame(rows), "routing_algorithms": told}
    return " ".join(
        routing_text.algorithms_said(tables, settings | {"scoring": ["softmax"]}, LABELS)
    )


def hot(shares: list[float], even: float = 0.25) -> str:
    once = pd.DataFrame({"hot_set_share": shares, "even_share": even})
    return cache_text.hot_set(once, 2)


DOMAIN_CHECKS = (specialization.domain_specialization, specialization.domain_beyond_token)
TOLD = {
    "one domain": (partial(told, beyond(math.nan, domain_mi_p=math.nan), documents=(60,)), ""),
    "counts": (partial(told, beyond(0.6), counts_only=True), "Counts alone cannot tell whether experts specialise by domain"),
    "too few documents": (partial(told, beyond(0.6), documents=(3, 4)), "Too few documents to tell whether experts specialise by domain: 7 documents in 2 domains, of 8 that it takes at least."),
    "documents enough": (partial(told, beyond(0.6), documents=(4, 4)), "Experts specialise by domain in 1 of 1 routers"),
    "no null": (partial(told, beyond(0.6, p99=math.nan)), "Too few documents to tell"),
    "beyond chance": (partial(told, beyond(0.13, domain_mi_p=0.0099)), "Routing differs by domain in 1 of 1 routers, most in layer 0 (0.130 bits; documents by chance give 0.100)"),
    "within chance": (partial(told, beyond(0.13, domain_mi_p=0.01)), "No expert specialises by domain"),
    "within a wide margin": (partial(told, beyond(0.15, p99=0.2, domain_mi_p=0.5)), 'reach 0.20 bits by chance (a negative result needs less than 0.2).'),
    "within a narrow one": (partial(told, beyond(0.15, p99=0.1999, domain_mi_p=0.5)), "No expert specialises by domain"),
    # log₂ of 8 experts is 3
    "specialised": (partial(told, beyond(0.401)), "Experts specialise by domain in 1 of 1 routers; most in layer 0"),
    "not specialised": (partial(told, beyond(0.399)), "An untrained router can show as much: a trace with --random-init is the baseline."),
    "specialised, by its threshold": (partial(told, beyond(0.401), limits={"specialised": 0.101}), "Routing differs by domain in 1 of 1"),
    "one and one more": (partial(told, beyond(0.6), beyond(0.2), beyond(0.1, domain_mi_p=0.5)), "Experts specialise by domain in 1 of 3 routers, and routing differs by domain in 1 more; most in layer 0"),
    "who": (partial(told, beyond(0.6)), ': expert 0 takes 30% of the tokens of "code", 1.4x its mean over domains.'),
    "untrained": (partial(told, beyond(0.6), seed=3), "This model was never trained (random weights, seed 3), so nothing here is specialisation"),
    "vocabulary": (partial(told, beyond(0.6, domain_mi_given_token_bits=0.266)), "Given the token id, the domain still carries 0.266 bits about the expert in layer 0 (documents by chance give 0.100): most of it is vocabulary."),
    "topic": (partial(told, beyond(0.6, domain_mi_given_token_bits=0.267)), ": not vocabulary alone."),
    "beyond vocabulary": (partial(told, beyond(0.6, domain_mi_given_token_p=0.0099)), ": not vocabulary alone."),
    "vocabulary may be all": (partial(told, beyond(0.6, domain_mi_given_token_p=0.01)), ": that may be chance, so vocabulary may be all of it."),
    # simulations
    "as recorded": (routed, "As recorded, layer 1/1 is the least balanced: its busiest expert gets 2.00x the mean load over all tokens."),
    "balanced": (partial(routed, ("x", 2, 0.1999, 0.5)), "that balance every layer (no expert gets 1.2x the mean load), x keeps the most probability mass: at least 50%"),
    "not balanced": (partial(routed, ("x", 2, 0.2, 0.5)), "no causal algorithm with the same compute balances every layer"),
    "computes as much": (partial(routed, ("x", 2.0099, 0.1, 0.5)), "x keeps the most"),
    "computes more": (partial(routed, ("x", 2.0101, 0.1, 0.9)), "no causal algorithm with the same compute"),
    "computes less": (partial(routed, ("x", 1.9899, 0.1, 0.9)), "no causal algorithm with the same compute"),
    "the most kept": (partial(routed, ("x", 2, 0.1, 0.51), ("y", 2, 0.15, 0.52)), "y keeps the most"),
    "not the future": (partial(routed, ("expert choice", 2, 0.0, 0.9)), "no causal algorithm with the same compute"),
    "leaks": (partial(routed, ("expert choice", 2, 0.0, 0.9)), "Not causal: expert choice ("),
    "computes 1.005 times": (partial(routing_text.added_compute, 1.005), ""),
    "computes 1.0051 times": (partial(routing_text.added_compute, 1.0051), "; computes 1.01x as many experts per token"),
    "computes half": (partial(routing_text.added_compute, 0.5), "; computes 0.5x as many"),
    "hot": (partial(hot, [0.3, 0.3]), "Yes: in 2 of 2 layers the 2 busiest experts get at least 1.2x"),
    "hot in part": (partial(hot, [0.3, 0.2999]), "In part: in 1 of 2 layers"),
    "not hot": (partial(hot, [0.2999, 0.1]), "No: in 0 of 2 layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", TOLD)
def test_domains(case: str):
    telling, says = TOLD[case]
    said = telling()
    assert (says in said) if says else said == "", said


def test_where_chance_is_not_known_nothing_is_said_beyond_vocabulary():
    assert "Given the token id" not in told(beyond(0.6, domain_mi_given_token_p=math.nan))


@pytest.mark.parametrize(("even", "asks"), [(0.834, True), (0.832, False)])
def test_a_hot_set_of_nearly_all(even: float, asks: bool):
    said = "hold nearly all experts: simulate fewer slots"
    assert (said in hot([1.0], even)) == asks


def test_capacity_names_the_worst_router():
    how: Any = {"algorithms": ["as recorded"]}
    made = simulate_routing(ROOT / "sample_traces/collapsed", capacity_factors=[1.0], **how)
    tables = {name: table.copy() for name, table in made.tables.items()}
    main, needed = (tables[name].set_index("router") for name in ("capacity", "capacity_needed"))
    r, most = main["simulated_drop_rate"].idxmax(), needed["capacity_factor"].idxmax()
    worst, across = main.loc[r], tables["capacity_tokens"].iloc[0]
    expected = [
        f"layer {r} would drop most: {worst['simulated_drop_rate']:.1%} of its assignments; "
        f"{worst['tokens_hit']:.1%} of its tokens would lose an expert and "
        f"{worst['tokens_lost']:.1%} all",
        f"{across['hit_anywhere']:.1%} of tokens would lose an expert in at least one layer, and "
        f"{across['lost_anywhere']:.1%} all experts",
        f"takes a factor of {needed['capacity_factor'][most]:.2f} (layer {most}), which leaves "
        f"{needed['unused_capacity'][most]:.0%}",
        *(f"drop rate by position in the {of}: first tenth" for of in ("document", "group")),
    ]
    for sentence, said in zip(made.verdict, expected, strict=False):
        assert said in sentence
    by_place = tables["capacity_by_position"]
    last = (by_place["router"] == r) & (by_place["tenth"] == 10)
    by_place.loc[last & (by_place["position_in"] == "document"), "simulated_drop_rate"] = np.nan
    unknown = capacity_text.drops_said(tables, dict(made.settings), dict(enumerate("0123")))
    assert len(unknown) == len(expected) - 1, "a tenth without tokens"
    wide = simulate_routing(ROOT / "sample_traces/collapsed", capacity_factors=[64.0], **how)
    assert wide.verdict[0].endswith("no layer would drop an assignment.")
    assert wide.verdict[2].startswith("As recorded, layer")
    tables["capacity"]["simulated_drop_rate"] = np.nan
    [nothing] = capacity_text.drops_said(tables, dict(made.settings), {})
    assert "no router made an assignment" in nothing


def test_decode_says_what_it_has_steps_of():
    rows = [(1, 9, 2.0, 2.0, 0.25), (8, 9, 7.0, 7.5, 0.875), (32, 0, None, 8.0, None)]
    names = ["batch", "steps", "distinct_experts", "independent", "share_of_experts"]
    table = pd.DataFrame(rows, columns=names).assign(bytes_per_token=None)
    needed = pd.DataFrame({"reads_all_from": [24.0, 20.0], "compute_bound_from": np.nan})
    settings = {"decoded": True, "weight_bits": 16, "too_few": False}
    sentences = decode_text.verdict({"decode": table, "batch_needed": needed}, settings, {})
    chance = "(25% of them; expected by chance: 2.0)."
    assert sentences[0] == f"1 sequence reads 2.0 experts per layer and step {chance}"
    assert sentences[2] == "No step of 32 sequences: the trace has too few at any position."
    saturated = (
        "From 24 sequences on, a step would read 95% of the experts in use in every layer, if"
    )
    assert sentences[3].startswith(saturated)
    assert len(sentences) == 5
    tables = {"decode": table, "batch_needed": needed.assign(compute_bound_from=[100.0, 300.0])}
    bound = decode_text.verdict(tables, settings, {})
    assert bound[4].startswith("Beyond about 200 sequences a larger batch stops helping")
