"""Power limits and clock limits of cards, put back whatever happens, and meters of energy."""
