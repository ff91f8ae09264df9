"""The other side of a comparison: plain libraries in a process that cannot import finequant."""

from __future__ import annotations

WITHOUT_FINEQUANT = """
import importlib.abc, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "finequant":
            raise ImportError("finequant is not to be had here")

sys.meta_path.insert(0, Blocker())
try:
    import finequant.quantize.scheme
except ImportError:
    pass
else:
    sys.exit("finequant can be imported")
"""
"""Begins the program of such a process."""
