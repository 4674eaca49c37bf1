"""Everything that knows Ray: the deployments and the graph that they form."""
