"""The one configuration: its schema, how it is loaded, and the environment it names."""
