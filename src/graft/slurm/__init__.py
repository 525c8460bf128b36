"""A recipe as a chain of SLURM jobs: submitted (submit.py), followed and cancelled (status.py). What runs in a job is slurm/'s and launch/'s."""
