"""The desired state: followed, compared with what is served, and reported."""
