"""Where rewards come from besides a reward model."""
