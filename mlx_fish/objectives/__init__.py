"""What training minimises: rows of a data set to labelled tokens, and the tokens' log-probabilities to a loss."""

from mlx_fish.objectives.objective import Objective
from mlx_fish.objectives.pt import PT
from mlx_fish.objectives.sft import SFT

OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in (SFT, PT)}

__all__ = ["OBJECTIVES", "Objective"]
