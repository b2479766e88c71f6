"""Fine-tune a model on the fish-care data: a minimal example of the Python interface.

    python scripts/simple_finetune.py              # the last converted model, else Qwen/Qwen2-0.5B
    python scripts/simple_finetune.py MODEL_FOLDER

Writes `finetuned_model/` and replaces an earlier run there. To ask the model, run `python scripts/inference.py`.
"""

import sys

from mlx_fish.config import TrainConfig
from mlx_fish.errors import FishError
from mlx_fish.training.train import train


def main() -> None:
    if len(sys.argv) > 2 or sys.argv[1:] in (["-h"], ["--help"]):
        sys.exit(__doc__)
    config = TrainConfig(
        model=sys.argv[1] if len(sys.argv) == 2 else None,
        data="fish_care",  # or a .jsonl file with rows {"question": …, "answer": …}
        iters=10,
        batch_size=4,
        learning_rate=2e-4,
        lora_rank=8,
        overwrite=True,
    )
    try:
        train(config)
    except FishError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
