"""Rotary position embedding of query and key in one launch."""

from .api import rotary, rotary_tables

__all__ = ["rotary", "rotary_tables"]
