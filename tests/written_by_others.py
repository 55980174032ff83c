"""What stores make of snapshots that they have not written themselves, or that nobody can read."""

from __future__ import annotations

import pytest

from retrykit.errors import CodecError

# What nobody can read stays as it is; what somebody wrote in another way than we do can still be read.
LAYOUTS = {
    "nothing": ("", None),
    "no JSON": ("xx", None),
    "one brace": ("{", None),
    "an array": ("[]", None),
    "nothing, spaced": ("{ }", {}),
    "spaced": ('{ "format": 1, "retry_count": 3 }', {"format": 1, "retry_count": 3}),
    "readable": ('{\n "retry_count": 3,\n\n "name": "o"\n}', {"retry_count": 3, "name": "o"}),
}


class WrittenByOthers:
    """For every store: `opened` opens one with these bounds, `overwrite` puts another text into its place for a key."""

    @pytest.mark.parametrize(("written", "read"), LAYOUTS.values(), ids=LAYOUTS)
    def test_it_is_evicted_and_as_readable_as_before(self, opened, overwrite, written, read):
        cache = opened(capacity=1, on_full="evict_oldest", tombstones=5)
        cache.save("a/1", {"retry_count": 3}, None)
        overwrite(cache, "a/1", written)
        for number in range(2, 5):
            assert cache.save(f"a/{number}", {"retry_count": 1}, None) is not None
        assert [key for key, _ in cache.items()] == ["a/4"]
        if read is None:
            with pytest.raises(CodecError):
                cache.load("a/1")
        else:
            found = dict(cache.load("a/1").snapshot)
            assert found.pop("evicted", {"by": "capacity"})["by"] == "capacity"
            assert found == read

    def test_one_veto_that_cannot_be_read_hides_no_other(self, opened, overwrite, caplog):
        cache = opened()
        for number in range(3):
            cache.save(f"a/{number}", {"retry_count": 1, "veto": "poison"}, None)
        overwrite(cache, "a/1", '{"veto":')
        assert sorted(cache.vetoed(["a/0", "a/1", "a/2"])) == ["a/0", "a/2"]
        assert "the veto of 'a/1' cannot be read, and forbids nothing" in caplog.text
        with pytest.raises(ValueError, match="at most 600 characters, not 601"):
            cache.vetoed(["a" * 601])

    def test_the_bound_of_tombstones_holds_whoever_makes_them(self, opened, pruned_often):
        cron, worker = opened(time_to_live=10), opened(time_to_live=10, tombstones=0)
        for number in range(30):
            worker.save(f"a/{number}", {"retry_count": 1, "last_failed_at": 1.0}, None)
        assert cron.expire() == 30
        assert len(worker.open_keys("a/", 50)) == 30
        for number in range(pruned_often):
            worker.save(f"b/{number}", {"completed_at": 4e9}, None)
        assert worker.open_keys("a/", 50) == []
