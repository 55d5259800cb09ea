"""Policy gradient: keep probabilities of all units, learned from losses alone."""
