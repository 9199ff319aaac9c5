"""Ray actors: one thin host for every role over the plain classes of `rlhf_ray.workers`, and groups of them."""
