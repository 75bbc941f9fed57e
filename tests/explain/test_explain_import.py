"""What importing loads."""

from __future__ import annotations

import subprocess
import sys


def test_the_package_does_not_load_it_and_it_does_not_load_matplotlib() -> None:
    program = """
import sys, ffr_ext
assert not [name for name in sys.modules if name.startswith("ffr_ext.explain")]
before = set(sys.modules)
import ffr_ext.explain
rooms = {name.split(".")[1] for name in set(sys.modules) - before if name.startswith("ffr_ext.")}
assert "matplotlib" not in sys.modules and rooms == {"explain"}, rooms
for name in ffr_ext.explain.__all__:
    getattr(ffr_ext.explain, name)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
