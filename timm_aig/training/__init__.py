"""Training and evaluation: the trainer, its checkpoints and schedules, data sets, budgets measured on images."""
