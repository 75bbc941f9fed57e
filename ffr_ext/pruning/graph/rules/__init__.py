"""One rule for each op: what it does to channels and to constants. A new op is three lines here.

`pointwise` (and ops whose inputs are all constant), `layers` (convolutions, linear layers, attention), `norms`,
`shape` (views, cat, pooling, reductions). `ffr_ext.pruning.graph` imports them, and with that they are known.
"""
