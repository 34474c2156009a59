"""The agent: serves models on one node, routes to its peers, reports what happened. Begin reading at daemon.py."""
