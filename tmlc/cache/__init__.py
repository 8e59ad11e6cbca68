"""The compile cache: an unchanged compilation is handed out again instead of being done again.

Nothing here imports torch: a hit costs the look-up and a link.
"""

from tmlc.cache.key import CompileKey, DigestMemo, compile_key
from tmlc.cache.store import CompileCache, Lookup, cache_folder

__all__ = ["CompileCache", "CompileKey", "DigestMemo", "Lookup", "cache_folder", "compile_key"]
