"""Text on both sides of the engine: tokenizer, chat template, detokenizer, stops, reasoning."""
