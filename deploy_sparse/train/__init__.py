"""Whatever would be a bug in every recipe if it were wrong in one: the train step, evaluation, checkpoints, resume."""
