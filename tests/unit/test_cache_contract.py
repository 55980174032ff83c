from __future__ import annotations

from retrykit.cache import MapRetryContextCache
from retrykit.testing import TombstoneContract


class TestMapRetryContextCache(TombstoneContract):
    leaves_tombstones = True
    threads = 4
    rounds = 100

    def make_cache(self, directory, **options):
        return MapRetryContextCache(**options)
