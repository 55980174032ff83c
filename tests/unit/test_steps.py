"""What the flow asks for, as it is shown when a test or a person looks at a flow."""

from __future__ import annotations

from retrykit.steps import ATTEMPT, Load, Pause, Save


def test_steps_show_their_data():
    assert repr(ATTEMPT) == "ATTEMPT"
    assert repr(Pause(1.5)) == "Pause(seconds=1.5)"
    assert "key='orders/m-1'" in repr(Load("orders/m-1"))
    assert "expected=None" in repr(Save("orders/m-1", {}, None))
