"""Requests that this service cannot serve well now go to an OpenAI-compatible upstream."""
