"""Tests of one real service: package-scoped fixtures end with the folder."""
