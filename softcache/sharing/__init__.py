"""Caches that travel: to and from a remote, whole or in part, verified on the way; mended; what nobody needs deleted.

Written in this order: blobs, manifest, tag; read the other way round. So a tag that can be read points at a cache that
is whole.
"""

from __future__ import annotations

from softcache.sharing.gc import Garbage, gc
from softcache.sharing.pull import pull
from softcache.sharing.push import Pushed, push
from softcache.sharing.repair import Repaired, repair
from softcache.sharing.stream import stream

__all__ = ["Garbage", "Pushed", "Repaired", "gc", "pull", "push", "repair", "stream"]
