"""The weights that a sub-layer is computed with, on each route."""
