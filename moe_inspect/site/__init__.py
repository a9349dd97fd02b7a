"""A static site of many traces: a page each, and an index that is searched by expert and token."""

from moe_inspect.site.build import atlas

__all__ = ["atlas"]
