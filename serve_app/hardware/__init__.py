"""What this machine has: cards, cores and their features, and who holds a card."""
