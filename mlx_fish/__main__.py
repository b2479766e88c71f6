"""`python -m mlx_fish` is `mlx-fish`."""

from mlx_fish.cli import main

if __name__ == "__main__":
    main()
