from __future__ import annotations

from retrykit.cache import MapRetryContextCache
from retrykit.testing import ContextCacheContract


class TestMapRetryContextCache(ContextCacheContract):
    leaves_tombstones = True
    threads = 4
    rounds = 100

    def make_cache(self, directory, **options):
        return MapRetryContextCache(**options)
