"""Takes a sample of the documents of a trace.

D documents.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from moe_inspect.errors import MoeInspectError, check_whole
from moe_inspect.text import plural
from moe_inspect.trace.derived import shards
from moe_inspect.trace.files.checksums import Json
from moe_inspect.trace.files.location import Remote, output_location
from moe_inspect.trace.manifest import write_manifest
from moe_inspect.trace.output_dir import check_directory
from moe_inspect.trace.reader import Trace, place_of
from moe_inspect.trace.verify import Verification, verify
from moe_inspect.trace.writer.whole import whole_trace


def sample(
    trace: Trace | str | Path,
    out: str | Path,
    *,
    documents: int | None = None,
    share: float | None = None,
    seed: int = 0,
    by_domain: bool = False,
    rest: bool = False,
    overwrite: bool = False,
) -> Trace:
    """Writes a trace at `out` that holds a random sample of the documents of `trace`, and returns
    it.

    Whole documents with everything that was recorded of them, in the order of the trace. Documents,
    sequences and forward passes keep their numbers, tokens are numbered anew. The trace is verified
    first and the sample at the end; `sample` in its trace.json says what it is a sample of. The
    same arguments give the same sample.

    Args:
        trace: the directory of a trace with decisions.
        out: the directory to write, or its URL (`s3://bucket/trace`).
        documents: how many documents.
        share: which share of the documents, above 0 to 1, rounded to whole documents; at least one.
        seed: determines which.
        by_domain: so many documents, or such a share, of each domain.
        rest: the documents that the same call without it leaves out.
        overwrite: replace a trace at `out`.

    Raises:
        MoeInspectError: neither or both of `documents` and `share` are given, there are not so many
            documents, or the trace holds counts only, is damaged or still written. Nothing is left
            at `out`.
    """
    path, place = place_of(trace), output_location(out)
    _check_size(documents, share, seed)
    check_directory(place, overwrite, resumable=False)
    if shards.same_place(place, path):
        raise MoeInspectError(f"{out} is the trace to sample: choose another directory")
    opened = Trace(path)
    if opened.counts_only:
        said = f"{path} holds counts only, which cannot be sampled: {opened.more_than_counts}"
        raise MoeInspectError(said)
    found = shards.verified(opened, path)
    listed = opened.documents()
    chosen_D = _chosen(path, listed, documents, share, seed, by_domain)
    if rest:
        chosen_D = np.setdiff1d(listed["document"].to_numpy(), chosen_D)
    if not len(chosen_D):
        raise MoeInspectError(f"no document of {path} is left: the sample holds all of them")
    stated: Json = {"share": share} if documents is None else {"documents": int(documents)}
    stated |= {"seed": int(seed), "by_domain": by_domain, "rest": rest}
    stated["of"] = shards.origin(opened, found)
    with whole_trace(place, overwrite, "no sample was taken") as (draft, _):
        manifest = _manifest(opened, len(chosen_D), stated, found)
        words = opened.vocabulary_table
        target = shards.Target(draft, manifest, words if len(words) else None)
        target.add_documents(opened, chosen_D)
        manifest["counts"] |= {"tokens": target.copied["tokens"], "decisions": target.decisions}
        write_manifest(draft, manifest)
        written = verify(draft)
        if not written.ok:
            raise MoeInspectError(f"{path} was changed meanwhile: {written}")
        for name, copied, checked in target.differences([written]):
            raise MoeInspectError(
                f"{path} was changed meanwhile: {copied:,} {name} were copied, {checked:,} are in "
                "the sample"
            )
    return Trace(place)


def _check_size(documents: int | None, share: float | None, seed: int) -> None:
    if (documents is None) == (share is None):
        raise MoeInspectError("give the size of the sample: documents or share")
    check_whole("seed", seed)
    if documents is not None:
        check_whole("documents", documents, 1)
    if share is not None and not 0 < share <= 1:
        raise MoeInspectError(f"share is {share:g}: give a share above 0, up to 1")


def _chosen(
    path: Path | Remote,
    listed: pd.DataFrame,
    documents: int | None,
    share: float | None,
    seed: int,
    by_domain: bool,
) -> np.ndarray:
    """int32 [D], sorted: the documents of the sample."""
    rng, parts = np.random.default_rng(int(seed)), list[np.ndarray]()
    labels = listed["domain"].astype(str)
    groups = sorted(listed.groupby(labels)) if by_domain else [("", listed)]
    for label, group in groups:
        number_D = np.sort(group["document"].to_numpy())
        n = int(documents) if documents is not None else max(1, round((share or 0) * len(number_D)))
        if n > len(number_D):
            where = f"domain {label} of {path}" if by_domain else f"{path}"
            said = f"{where} has {plural(len(number_D), 'document')}, {n:,} were asked for"
            raise MoeInspectError(said)
        parts.append(rng.permutation(number_D)[:n])
    return np.sort(np.concatenate([np.zeros(0, np.int32), *parts]))


def _manifest(trace: Trace, documents: int, stated: Json, found: Verification) -> Json:
    """That of the trace, but for what is of the sample."""
    own = ("digest", "vocabulary", "generation")
    manifest = {k: v for k, v in trace.manifest.items() if k not in own}
    corpus = shards.of_text(manifest.get("corpus") or {})
    return {
        **manifest,
        "status": "complete" if found.status == "complete" else "interrupted",
        "capture": shards.written_here(manifest["capture"]),
        "corpus": {**corpus, "documents": documents, "plan": shards.random_weights(corpus)},
        "counts": dict(manifest.get("counts") or {}),
        "sample": stated,
    }
