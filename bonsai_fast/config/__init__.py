"""What a run is asked to do: options, their allowed values, presets."""

from bonsai_fast.config.run import PruneConfig, ResolvedConfig

__all__ = ["PruneConfig", "ResolvedConfig"]
