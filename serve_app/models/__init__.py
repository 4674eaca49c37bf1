"""The networks and how their weights are loaded."""
