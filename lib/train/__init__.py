"""Training: learner, schedules, range test, checkpoints."""
