"""``python -m nspo_lightning``."""

from nspo_lightning.cli import main

if __name__ == "__main__":
    main()
