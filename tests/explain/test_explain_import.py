"""What importing loads."""

from __future__ import annotations

import subprocess
import sys


def test_the_package_does_not_load_it_and_it_does_not_load_matplotlib() -> None:
    program = """
import sys, ffr_ext
assert not [name for name in sys.modules if name.startswith("ffr_ext.explain")]
import ffr_ext.explain
assert "matplotlib" not in sys.modules and "ffr_ext.pruning" not in sys.modules
for name in ffr_ext.explain.__all__:
    getattr(ffr_ext.explain, name)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
