"""One rule for each op: what it does to channels and to constants. A new op is three lines here.

`pointwise` (and ops whose inputs are all constant), `layers` (convolutions, linear layers, embeddings), `recurrent`,
`attention`, `contractions` (einsum, products, sums, vector norms), `norms` (and pooling, reductions), `shape` (views,
cat, slices, padding), `split`, `routing` (rows taken by their numbers), `rearrange` (pixel shuffle).
`ffr_ext.pruning.graph` imports them, and with that they are known.
"""
