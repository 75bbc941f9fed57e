"""`python -m benchmarks arena`: which method, for which budget, at what cost; on data and a model of one's own.

`methods` says what is compared, `training` is one run that may stop after any epoch, `cuts` makes the smaller networks
and measures them, `runner` does many runs side by side and searches the strengths, `report` makes the table and the
pictures.
"""
