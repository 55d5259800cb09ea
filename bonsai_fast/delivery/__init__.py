"""From a pruned model to a saved one: recover, save, load again, compare, measure."""
