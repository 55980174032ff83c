"""`retrykit demo`: a job with poison messages, failing commits and dying processes, watched and then audited.

`plan` says which message will do what, `worker` is a consumer process as a user would write it, `ledger` its database,
`supervisor` starts workers and replaces those that die, `progress` and `display` show it, `report` counts afterwards
what really happened, `run` puts it together.
"""

from __future__ import annotations
