"""What `compact` makes of networks that others wrote: `python -m benchmarks networks --help`."""

from __future__ import annotations
