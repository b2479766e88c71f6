"""Training objectives: how rows of a dataset become supervised tokens, and how log-probabilities become a loss."""

from mlx_fish.objectives.objective import Objective
from mlx_fish.objectives.pt import PT
from mlx_fish.objectives.sft import SFT

OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in (SFT, PT)}

__all__ = ["OBJECTIVES", "Objective"]
