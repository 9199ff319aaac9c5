"""Episodes of several turns: the policy answers, a class of the user's replies."""

from rlhf_ray.environments.interface import Answer, Environment, StepResult

__all__ = ["Answer", "Environment", "StepResult"]
