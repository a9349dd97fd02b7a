"""Verdict thresholds. All can be set; `summary` lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from moe_inspect.analysis.metrics.balance import STARVED, UNEVEN
from moe_inspect.errors import MoeInspectError
from moe_inspect.text import no_such


@dataclass(frozen=True)
class Thresholds:
    """uneven: max_vio of a router. overloaded, starved: load ratio of an expert. specialised:
    information that the domain carries about the expert, beyond chance, as a share of
    the log₂ E bits that identify it. Untrained routers reach 0.08 from the text alone (maximum over
    six architectures of 8 to 128 experts, five random initialisations each, on the bundled corpus:
    benchmarks/untrained.py), the trained sample traces 0.15 and 0.19; another text or model has its
    own baseline, which a trace with --random-init gives. no_domain: bits that chance gives up
    to which a negative result means anything. tie: tie rate of the logits. repeated: share of
    tokens in runs of identical rows."""

    uneven: float = UNEVEN
    overloaded: float = 2.0
    starved: float = STARVED
    specialised: float = 0.1
    no_domain: float = 0.2
    tie: float = 0.01
    repeated: float = 0.01

    def facts(self) -> list[tuple[str, object]]:
        """The rows of `summary` on them: (key, condition)."""
        meaning = {
            "uneven": f"max_vio >= {self.uneven:g} and above chance",
            "overloaded": f"load_ratio >= {self.overloaded:g}",
            "starved": f"load_ratio < {self.starved:g}",
            "specialised": (
                f"(domain_mi_bits - domain_mi_null_bits) / log2(experts) >= {self.specialised:g}"
            ),
            "no_domain": f"domain_mi_null_p99_bits < {self.no_domain:g}",
            "tie": f"tie_rate >= {self.tie:g}",
            "repeated": f"share of tokens in runs of identical rows >= {self.repeated:g}",
        }
        return [(f"threshold_{name}", text) for name, text in meaning.items()]


def thresholds_with(changes: Mapping[str, float] | None = None) -> Thresholds:
    """The defaults with these changes. Raises MoeInspectError for an unknown name or a value that
    is negative or not finite."""
    changes, names = changes or {}, [f.name for f in fields(Thresholds)]
    for name, value in changes.items():
        if name not in names:
            raise MoeInspectError(no_such("threshold", name, names))
        if not 0 <= value < float("inf"):
            raise MoeInspectError(f"threshold {name} is {value:g}: give a number from 0 up")
    return replace(Thresholds(), **changes)
