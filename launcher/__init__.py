"""Every way in: what deepspeed starts, the nextpt command line, Slurm scripts."""
