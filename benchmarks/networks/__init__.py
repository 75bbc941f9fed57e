"""`python -m benchmarks networks`: what `compact` makes of networks that others wrote, and what it costs.

`zoo` says which (and `small_transformers` in which configurations), `libraries` finds where they are installed,
`protocol` is what is done to each and what is recorded, `main` keeps the rows in a CSV and draws the table by family.
"""
