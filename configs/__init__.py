"""Complete, commented configurations; `rlhf-ray train configs/NAME.yaml` finds them wherever it is run."""
