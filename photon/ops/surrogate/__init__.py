"""Surrogate gradient propagation: kept rows, with a gradient for the decision that kept them."""
