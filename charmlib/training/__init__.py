"""Training: a fastai Learner around CharmNet, the two stages, checkpoints and resume."""
