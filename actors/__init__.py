"""Ray actors: one thin host for every role, over plain classes of `rlhf_ray.workers`, and their groups."""
