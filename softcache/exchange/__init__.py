"""Caches in other people's containers: one file a container, both ways.

A member offers

- ``recognise(path)``: is that an export of this kind?
- ``export(cache, out, …)``: write it, or go on with it;
- ``restore(path, out)``: the cache again, byte for byte.

``foreign`` makes a cache of arrays that somebody has.
"""
