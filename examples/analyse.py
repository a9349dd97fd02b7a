"""Asks a trace with pandas and with DuckDB. Run: python examples/analyse.py [TRACE]"""

from __future__ import annotations

import sys
from pathlib import Path

import duckdb

import moe_inspect

SAMPLE = Path(__file__).parent.parent / "sample_traces/collapsed"
path = Path(sys.argv[1]) if len(sys.argv) > 1 else SAMPLE

# the report's tables are DataFrames
report = moe_inspect.report(path)
worst = report.tables["balance"].nlargest(1, "max_vio").iloc[0]
print(f"layer {worst['layer']:.0f} is the least balanced: max_vio {worst['max_vio']:.2f}")
print(report.tables["domains"].nlargest(3, "lift")[["layer", "domain", "expert", "lift"]])

# the decisions themselves, one router at a time, joined with their tokens
trace = moe_inspect.open_trace(path)
decisions = trace.routing(layers=3).merge(trace.tokens()[["token", "domain"]], on="token")
print(decisions.groupby("domain", observed=True)["expert_0"].agg(lambda ids: ids.mode()[0]))

# the same files, without moe-inspect
print(
    duckdb.sql(
        f"""
        select domain, expert_0, count(*) as tokens
        from '{path}/routing/*.parquet' join '{path}/tokens/*.parquet' using (token)
        where layer = 3
        group by all order by tokens desc limit 5
        """
    )
)
