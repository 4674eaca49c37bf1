"""Tests on one shared Ray: package-scoped fixtures end with the folder."""
