"""The `xeray` command."""
