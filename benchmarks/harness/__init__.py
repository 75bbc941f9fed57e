"""How it is measured: timing in turns, memory, shapes, networks, and what is right."""
