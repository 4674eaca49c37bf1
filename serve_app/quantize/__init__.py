"""Fewer bits per weight: `xeray quantize` makes such checkpoints, `xeray eval` judges them."""
