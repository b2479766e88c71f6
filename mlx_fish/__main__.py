"""Run the `mlx-fish` command as `python -m mlx_fish`."""

from mlx_fish.cli import main

if __name__ == "__main__":
    main()
