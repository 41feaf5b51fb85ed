"""What pays on a target, decided by measurement: the one place where the stages meet."""
