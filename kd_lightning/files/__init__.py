"""Reading and writing files; below everything else."""
