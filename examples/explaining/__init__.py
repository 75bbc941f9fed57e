"""Helpers of examples/flowers.py and examples/survivors.py: the net, the methods that are compared, the pages."""
