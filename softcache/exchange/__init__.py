"""Containers that a cache is put into, and taken out of again: one file each, listed in :data:`FORMATS`.

A member offers

- ``recognise(path)``: is that an export of this kind?
- ``export(cache, out, …)``: write it, or go on with it;
- ``restore(path, out)``: the cache again, byte for byte.

``foreign`` makes a cache of arrays that somebody has.
"""

from __future__ import annotations

FORMATS = {"webdataset": "softcache.exchange.webdataset", "hdf5": "softcache.exchange.hdf5"}
