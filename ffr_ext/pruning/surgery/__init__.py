"""Carrying it out: cuts of single tensors, the plan that lists them, and applying it to a model and its optimizer."""
