from __future__ import annotations

from retrykit.cache import MapRetryContextCache
from retrykit.testing import ContextCacheContract


class TestMapRetryContextCache(ContextCacheContract):
    threads = 4
    rounds = 100

    def make_cache(self, directory, **options):
        return MapRetryContextCache(**options)
