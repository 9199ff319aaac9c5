"""What is sent from trainer to generation engines, how it travels, and how its arrival is verified."""
