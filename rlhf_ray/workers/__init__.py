"""The plain classes behind the actors: what one process of each role does. Testable without Ray."""
