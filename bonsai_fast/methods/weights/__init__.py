"""Methods that zero single weights, one decoder layer at a time."""
