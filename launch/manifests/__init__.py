"""Files that start a cluster for a configuration: Kubernetes, Slurm, Ray's autoscaler."""
