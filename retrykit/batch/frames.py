"""The frames of failures, which know more than a report is to keep alive."""

from __future__ import annotations

from traceback import clear_frames


def forget_frames(error: BaseException | None, *, locals_only: bool = False) -> None:
    """Let go of what the frames of an error and its causes know.

    Frames know the whole chunk, which is not to live as long as a report.

    And those of an interruption know the cursor that was at work: SQLite ends neither the connection nor its
    transaction before that is gone, and the job store would wait for its lock.
    """
    seen: set[int] = set()
    left = [error]
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            if locals_only:
                clear_frames(one.__traceback__)
            else:
                one.__traceback__ = None
            left += (one.__cause__, one.__context__)
