"""What a user's type checker says of the public API: `tests/typing/api.py` has calls to accept and to refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
API = ROOT / "tests/typing/api.py"
CHECKERS = {"mypy": ["mypy"], "pyright": ["pyright", "--pythonpath", sys.executable]}


@pytest.mark.skipif(not API.exists(), reason="tests/typing/api.py is not there")
@pytest.mark.parametrize("checker", CHECKERS)
def test_type_checkers_see_the_api_as_it_is_meant(checker):
    command = [sys.executable, "-m", *CHECKERS[checker], str(API)]
    seen = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert seen.returncode == 0, seen.stdout + seen.stderr
