"""Training: the stage schedule, the perturbations, one step, and a loop that resumes exactly."""
