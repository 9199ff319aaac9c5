"""A run as a Ray Job of a cluster: what goes along, following it from here, and its driver over there."""
