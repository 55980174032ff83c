"""What the SQL stores make of rows that others have written, and in which order they drop what is over."""

from __future__ import annotations

import pytest
from sqlalchemy import update

from retrykit.sql import dropping, rk_context, rows
from tests.written_by_others import WrittenByOthers


class SqlWrittenByOthers(WrittenByOthers):
    """For every database: `opened` opens a store with these bounds."""

    @pytest.fixture
    def overwrite(self):
        def put(cache, key, written):
            with cache.engine.begin() as connection:
                connection.execute(update(rk_context).where(rk_context.c.context_key == key).values(snapshot=written))

        return put

    @pytest.fixture
    def pruned_often(self, monkeypatch):
        monkeypatch.setattr(dropping, "PRUNE_EVERY", 40)
        return 10

    def test_what_was_over_first_goes_first_whatever_it_is(self, opened):
        cache = opened(time_to_live=10, tombstones=50)
        for number in range(6):
            cache.save(f"a/{number}", {"retry_count": 1, "last_failed_at": 4e9 + number}, None)
        cache.save("mark", {"completed_at": 4e9, "expires_at": 4e9 + 13.5}, None)
        assert cache.expire(4e9 + 20.0, limit=2) == 2
        assert cache.load("mark") is not None
        assert [key for key, _ in cache.evicted()] == ["a/0", "a/1"]
        assert cache.expire(4e9 + 20.0, limit=3) == 3
        assert (cache.load("mark"), len(list(cache.evicted()))) == (None, 4)
        assert cache.expire(4e9 + 20.0) == 2

    def test_mark_that_a_process_of_the_version_before_makes_of_a_tombstone_is_a_mark(self, opened):
        cache = opened(capacity=1, on_full="evict_oldest", tombstones=1)
        cache.save("a/1", {"retry_count": 1}, None)
        cache.save("a/2", {"retry_count": 1}, None)
        with cache.engine.begin() as connection:
            revision = rows._next(cache.load("a/1").version, mark=True) % rows.REVISIONS
            mark = {"completed_at": 1.0, "expires_at": 9e9, "snapshot": '{"completed_at":1.0}'}
            # It knows nothing of the column that says when it was evicted.
            done = update(rk_context).where(rk_context.c.context_key == "a/1").values(revision=revision, **mark)
            connection.execute(done)
        for number in range(3, 8):
            cache.save(f"a/{number}", {"retry_count": 1}, None)
        assert [key for key, _ in cache.items()] == ["a/1", "a/7"]
        assert "a/1" not in [key for key, _ in cache.evicted()]
