"""Training on a SLURM cluster: the job script, what it runs on each node, and its submission."""
