"""Quantized Hugging Face checkpoints: one file per format, `table` by quant_method."""
