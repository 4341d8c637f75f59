"""cmscale: consistency models at 256 px, trained and evaluated on Slurm clusters."""

__version__ = "0.1.0"
