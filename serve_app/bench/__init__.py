"""Measurements of the service over HTTP, of the engine alone, and of what lies between them."""
